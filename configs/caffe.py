"""Caffe's AlexNet on ImageNet, `bvlc_alexnet`, and as `configs/caffe.py:caffenet` its CaffeNet, which pools before it
normalises.

    python -m tools.convert --weights=bvlc_alexnet.caffemodel --workdir=runs/caffe
    python main.py --config=configs/caffe.py --workdir=runs/caffe_again

Published for Caffe's weights, centre view: 57.1 % top-1 and 80.2 % top-5 accuracy for AlexNet, 57.4 and 80.4 % for
CaffeNet. Not measured here: neither the weights nor ImageNet have been at hand.

What differs from the paper's network: views of 227 pixels without padding; in the normalisation k is 1, and α is
divided by the size of the window; and Caffe knows no towers. It convolves in groups of maps, and normalises across
both: here they are two towers that are normalised across, on one device or on two.

What differs from Caffe's recipe:
- Photographs keep their shape: the shorter side becomes 256 pixels, and the central square is cut. Caffe's ImageNet was
  warped to 256×256.
- The mean image under all ten views is its centre; Caffe takes the part of the mean image that lies under the view.
- The initial weights are the paper's. Caffe has σ 0.005 in fc6 and fc7, and AlexNet there begins with biases of 0.1.
"""

import ml_collections

from configs import alexnet, base


def get_config(variant: str = "") -> ml_collections.ConfigDict:
    """The recipe; `variant` is '' or 'caffenet'."""
    base.check_variant("configs/caffe.py", variant, ("caffenet",))
    config = alexnet.get_config()
    config.batch_size = 256
    config.input.crop = 227
    config.input.lighting_std = 0.0
    config.model.order = "caffenet" if variant else "paper"
    config.model.lrn_k = 1.0
    config.model.lrn_alpha = 1e-4 / 5  # Caffe divides its 1e-4 by the size of the window
    config.model.lrn_across_towers = True
    config.optimizer.bias_rate = 2.0
    config.schedule.name = "steps"  # each 100,000 steps of 256 images
    config.schedule.factors = ((20.0, 1e-1), (40.0, 1e-2), (60.0, 1e-3), (80.0, 1e-4))
    return config
