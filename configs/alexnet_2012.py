"""AlexNet on ImageNet as its source code trained it in 2012: layers/layers-145.cfg and layer-params-145.cfg.

    python main.py --config=configs/alexnet_2012.py --workdir=runs/alexnet_2012

Where the code differs from the paper's text, this recipe follows the code: the order of the first two layers and a
second, spatial normalisation; wider initial weights in conv3 to conv5; biases at twice the kernels' first rate,
throughout, while the kernels' rate is lowered; the images divided by 1.1 while lighting is on; the epochs of each
change. Crops and reflections are drawn per image here, where the code drew them for 32 images at once.

Published: ten views 40.664 % top-1 and 18.210 % top-5 error on the validation set (the log of #145), after 91 epochs.
Not measured here: this project has not yet trained on ImageNet.

Variant, as `configs/alexnet_2012.py:longer`: what the authors did after the paper, to epoch 135. Published: 40.25 % and
17.99 %.
"""

import ml_collections

from configs import alexnet, base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe; `variant` is '' or 'longer'."""
    base.check_variant("configs/alexnet_2012.py", variant, ("longer",))
    config = alexnet.get_config()
    config.num_epochs = 91.0
    config.model.order = "2012"
    config.model.init = "2012"
    config.model.lrn_alpha = 1e-4 / 5  # the code divides the paper's constant by the size of the window
    config.input.lighting_divide = True
    config.input.lighting_until = 67.0
    config.optimizer.bias_rate = 2.0  # 0.02 beside 0.01
    config.schedule.name = "steps"
    factors = ((25.0, 1e-1), (51.0, 1e-2), (79.0, 1e-3))
    if variant == "longer":
        config.num_epochs = 135.0
        factors += ((91.0, 1e-1), (107.0, 1e-2), (124.0, 1e-3))
        config.input.lighting_again = ((91.0, 124.0),)
    config.schedule.factors = factors
    config.schedule.layers = (
        ("conv1/kernel", ((67.0, 0.1),)),  # times the common factor: 1e-5
        ("conv1", ((72.0, 0.0),)),  # frozen
        ("bias", tuple((epoch, 1 / factor) for epoch, factor in factors)),  # 0.02 throughout
    )
    return config
