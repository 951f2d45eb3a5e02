"""What a run says to its user: what it is about to do, and what to do with the result."""

import pathlib
import sys

import jax

from run import metrics, workdirs
from run.setup import Run


def greeting(run: Run, step: int, resumed: bool) -> str:
    """What is about to happen, in a few lines."""
    if step >= run.durations.num_steps:
        return f"Nothing is left to train: {step} steps are done, of {run.durations.num_steps}.\nDevices: {run.layout}."
    count = sum(leaf.size for leaf in jax.tree.leaves(run.shapes.params))
    verb = f"Continuing after step {step}" if resumed else "Training"
    dataset, num_steps = run.config.dataset, run.durations.num_steps
    return (
        f"{verb}: {run.config.model.name} with {count:,} parameters on {dataset.name}, "
        f"{run.records.num_examples(dataset.train_split):,} training images of {run.records.num_classes} classes, "
        f"to step {num_steps} ({num_steps / run.durations.steps_per_epoch:.1f} epochs)."
        f"\nDevices: {run.layout}."
    )


def farewell(run: Run, step: int, values: dict[str, float]) -> str:
    """The errors of the best checkpoint, where everything lies, and what to type next.

    Args:
      step: the last step.
      values: metrics 'test/…', with the step of the best checkpoint as 'test/step'.
    """
    epoch = step / run.durations.steps_per_epoch
    doubled = f"num_steps={2 * step}" if run.config.num_steps else f"num_epochs={max(1, round(2 * epoch))}"
    tensorboard = pathlib.Path(sys.executable).with_name("tensorboard")
    split = workdirs.test_split(run.config)
    top5 = f"top-5 error {values['test/top5_error']:.2%}, " if run.records.num_classes > 5 else ""  # else it is 0
    centre = ""
    if "test/centre_top1_error" in values:  # earlier versions did not measure it
        centre = f"With the centre view alone, the top-1 error is {values['test/centre_top1_error']:.2%}.\n"
    chosen = (
        "chosen on the same images, which makes these errors look a little too low; dataset.test_split can name others"
    )
    if split != run.config.dataset.eval_split:
        chosen = f"chosen on eval_split={run.config.dataset.eval_split!r}"
    elif sum("eval/loss" in line for line in metrics.read_lines(run.workdir / "metrics.jsonl")) == 1:
        chosen = "not chosen: it is that of the last step, the only one that was evaluated"
    return f"""
Done: {step} steps, {epoch:.1f} epochs. Ten views of {split!r}, with the best checkpoint (step {values["test/step"]}):
top-1 error {values["test/top1_error"]:.2%}, {top5}mean class accuracy {values["test/mean_class_accuracy"]:.2%}.
{centre}The checkpoint was {chosen}.

metrics           {run.workdir / "metrics.jsonl"}
checkpoints       {run.workdir / "checkpoints"}
TensorBoard logs  {run.workdir}
to look at them   {tensorboard} --logdir={run.workdir}
to train further  the same command with --config.{doubled}"""
