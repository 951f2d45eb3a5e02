"""torchvision's AlexNet on ImageNet: one tower, no response normalisation ("One weird trick", Krizhevsky 2014).

    python -m tools.prepare --dataset=imagenet2012 --data_dir=data --manual_dir=WHERE_THE_TARS_ARE
    python main.py --config=configs/torchvision.py --workdir=runs/torchvision_again

Reproduces the network and the schedule of torchvision's `alexnet`: 90 epochs, the rate divided by 10 every 30.
Published, centre view: 56.522 % top-1 and 79.066 % top-5 accuracy, so 43.478 % and 20.934 % error. Not measured here:
this project has not yet trained on ImageNet.

What differs from torchvision's recipe:
- Views are random 224×224 crops of the central 256×256 square. Torchvision cuts windows of random area (8 to 100 %) and
  shape from the whole photograph and resizes them.
- The mean image of the training set is subtracted. Torchvision subtracts a mean per channel.
- Only kernels decay. Torchvision decays biases as well.
- The rate is inside the velocity, see `optimizer`. In PyTorch it is outside: the two differ after the rate changes.
"""

import ml_collections

from configs import base


def get_config() -> ml_collections.ConfigDict:
    """The recipe."""
    config = base.get_config()
    config.batch_size = 256
    config.num_epochs = 90.0
    config.dataset.name = "imagenet2012"
    config.dataset.eval_split = "validation"
    config.input.update(
        resize=256,
        crop=224,
        random_crop=True,
        reflect=True,
        scale=1 / 255,
        channel_std=(0.229, 0.224, 0.225),
    )
    config.model = dict(
        name="torchvision",
        num_classes=1000,
        width=1.0,  # multiplies the maps of every layer but fc8
        dropout_rate=0.5,
        towers=1,
        dtype="float32",
    )
    config.optimizer.update(learning_rate=0.01, momentum=0.9, weight_decay=1e-4)
    config.schedule.update(name="steps", factors=((30.0, 1e-1), (60.0, 1e-2)))
    return config
