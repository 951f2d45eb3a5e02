"""Claims of the paper, each a short override of one recipe, on Caltech-101.

    python -m tools.sweep --sweep=configs/sweeps/claims.py --workdir=runs/claims

The recipe is configs/caltech101.py:plain with images of half the size, half of the epochs, and a schedule with which
every arm learns. `:imagenet` takes the paper's recipe on ImageNet as it is. Published are the differences between the
logs of 2012, on the images of 2012 (those of 2010 for one_tower and centre_view), or what the paper says, sections 4.1
and 7. docs/reproduction.md has what was measured on Caltech-101. The sweep of ImageNet has not been run.
"""

from configs import base
from configs.sweeps import Arm, Sweep, error, last

TOP1, TOP5 = "top-1 error", "top-5 error"


def get_sweep(variant: str = "") -> Sweep:
    """The sweep; `variant` is '' or 'imagenet'."""
    base.check_variant("configs/sweeps/claims.py", variant, ("imagenet",))
    small = {
        "input.resize": 128,
        "input.crop": 112,
        "num_epochs": 20.0,
        # At that recipe's rate of 0.02, from the first step on, no_lrn stays at chance.
        "optimizer.learning_rate": 0.01,
        "schedule.warmup": 2.0,
        "schedule.name": "cosine",
        "schedule.factors": (),
    }
    return Sweep(
        config="configs/alexnet.py" if variant else "configs/caltech101.py:plain",
        overrides={} if variant else small,
        measures=(error("top1", TOP1), error("top5", TOP5)),
        curve="eval/top1_error",
        arms={
            "base": Arm(),
            "centre_view": Arm(  # log 145 of 2010
                published={TOP1: 0.01552, TOP5: 0.01296},
                reads={TOP1: last("test/centre_top1_error"), TOP5: last("test/centre_top5_error")},
            ),
            "one_tower": Arm({"model.towers": 1}, {TOP1: 0.01695, TOP5: 0.01230}),  # log 145-half
            "no_lrn": Arm({"model.lrn": False}, {TOP1: 0.01370, TOP5: 0.01152}),  # log 148
            "no_lrn2": Arm({"model.order": "no_lrn2"}, {TOP1: -0.00176, TOP5: -0.00092}),  # log 167
            "lrn2_first": Arm({"model.order": "lrn2_first"}, {TOP1: 0.00432, TOP5: 0.00464}),  # log 166
            "lrn_alpha_by_n": Arm({"model.lrn_alpha": 2e-5}),
            # Maps of 14, 7 and 4 pixels in place of 13, 6 and 3, because the last window may run over the edge.
            "pool_2": Arm({"model.pool_window": 2}, {TOP1: 0.00394, TOP5: 0.00300}),  # log 147
            "no_lighting": Arm({"input.lighting_std": 0.0}, {TOP1: 0.01}),  # section 4.1: "over 1%"
            "no_crop": Arm({"input.random_crop": False, "input.reflect": False}),
            "no_dropout": Arm({"model.dropout_rate": 0.0}),
            "no_conv3": Arm({"model.without": ("conv3",)}, {TOP1: 0.02}),  # section 7: "about 2%"
            "no_conv4": Arm({"model.without": ("conv4",)}, {TOP1: 0.02}),
            "no_conv5": Arm({"model.without": ("conv5",)}, {TOP1: 0.02}),
            "no_fc6": Arm({"model.without": ("fc6",)}),
            "no_fc7": Arm({"model.without": ("fc7",)}),
            "tanh": Arm({"model.activation": "tanh"}),
            "no_exchange": Arm(
                {"model.exchange": (), "model.features": (96, 320, 384, 384, 256, 8192, 4096)},
                {TOP1: 0.01164, TOP5: 0.01120},  # log 150
            ),
            "order_2012": Arm({"model.order": "2012"}),
            "recipe_2012": Arm(  # configs/alexnet_2012.py, without its initial weights and its schedule
                {
                    "model.order": "2012",
                    "model.lrn_alpha": 2e-5,
                    "optimizer.bias_rate": 2.0,
                    "input.lighting_divide": True,
                }
            ),
        },
    )
