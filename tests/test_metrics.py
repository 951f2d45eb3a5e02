"""The meter's arithmetic with given times, and what a recorder leaves behind a crash."""

import json
import os

import pytest
from tensorboard.backend.event_processing import plugin_event_accumulator

from run import metrics


def test_meter_times_steps_and_waits():
    """Three steps end at 10, 12 and 15 s; the third one's batch came half a second after the second step ended."""
    meter = metrics.Meter(batch_size=8)
    meter.add({"loss": 1.0}, arrived=5.0, ready=10.0)
    meter.add({"loss": 2.0}, arrived=9.0, ready=12.0)
    meter.add({"loss": 6.0}, arrived=12.5, ready=15.0)
    assert meter.read() == pytest.approx(
        {"train/loss": 3.0, "train/images_per_second": 16 / 5, "train/input_wait": 0.1}
    )


def test_meter_leaves_out_the_first_step_and_what_a_pause_covers():
    meter = metrics.Meter(batch_size=8)
    meter.add({"loss": 1.0}, arrived=0.0, ready=100.0)
    assert meter.read() == {"train/loss": 1.0}
    meter.pause()
    meter.add({"loss": 1.0}, arrived=900.0, ready=1000.0)
    meter.add({"loss": 1.0}, arrived=1000.0, ready=1002.0)
    assert meter.read()["train/images_per_second"] == 4


def test_recorder_goes_on_where_the_checkpoint_is(tmp_path):
    """Lines after the restored step go, as does one that a crash cut short; what was before stays."""
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": step, "epoch": step / 10, "train/loss": 1.0} for step in range(1, 6)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "epo')
    with metrics.Recorder(tmp_path, step=3, evaluated=3, num_steps=8) as recorder:
        recorder.write(4, 0.4, {"train/loss": float("nan")})
    assert metrics.read_lines(path) == [*lines[:3], {"step": 4, "epoch": 0.4, "train/loss": None}]


def test_tensorboard_forgets_what_a_crash_left_behind_the_checkpoint(tmp_path):
    """As TensorBoard's own reader has it, also before anything new is written."""

    def shown():
        reader = plugin_event_accumulator.EventAccumulator(str(tmp_path), {"tensors": 0}).Reload()
        return [event.step for event in reader.Tensors("train/loss")]

    def go_on(done, steps):
        for number, file in enumerate(sorted(tmp_path.glob("events*"))):
            file.rename(tmp_path / f"events.out.tfevents.100{number}.as-of-long-ago")
        with metrics.Recorder(tmp_path, step=done, evaluated=done, num_steps=8) as recorder:
            for step in steps:
                recorder.write(step, step / 10, {"train/loss": 1.0})

    go_on(0, range(1, 6))
    assert shown() == [1, 2, 3, 4, 5]
    go_on(3, [])
    assert shown() == [1, 2, 3]
    go_on(3, [4])
    assert shown() == [1, 2, 3, 4]


def test_what_is_no_line_is_left_out_and_the_rest_stays(tmp_path):
    path = tmp_path / "metrics.jsonl"
    whole = [{"step": 1, "epoch": 0.5}, {"step": 3, "epoch": 2, "train/loss": None}]
    damaged = ["5", "{}", '{"step": "x"}', '{"step": 2, "epo', '{"step": 2}', '{"step": 2, "epoch": 1, "a": "b"}']
    damaged += ['{"step": 2, "epoch": 1e400}', '{"step": 2, "epoch": 1, "eval/loss": 1e400}']
    lines = [json.dumps(whole[0]), *damaged, json.dumps(whole[1])]
    path.write_bytes(b"\xff\xfe\n" + "\n".join(lines).encode())
    assert metrics.read_lines(path) == whole
    assert metrics.read_lines(tmp_path / "none") == []


def test_details_are_recorded_but_not_said(tmp_path, capsys):
    with metrics.Recorder(tmp_path, step=0, evaluated=0, num_steps=8) as recorder:
        recorder.write(1, 0.1, {"train/loss": 1.0}, {"train/gradient_norm": 2.0})
    assert metrics.read_lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "epoch": 0.1, "train/loss": 1.0, "train/gradient_norm": 2.0}
    ]
    said = capsys.readouterr().out
    assert "loss 1" in said and "norm" not in said


@pytest.mark.parametrize(("steps", "says"), [(16, "Trace of steps 10 to 14"), (12, "Trace of steps 10 to 12")])
def test_trace(tmp_path, steps, says):
    said = []
    trace = metrics.Trace(tmp_path, 0, said.append)
    for step in range(1, steps + 1):
        trace.before(step)
    trace.close(steps)
    assert len(said) == 1 and said[0].startswith(says) and f"xprof --logdir={tmp_path}" in said[0]
    assert list((tmp_path / "plugins/profile").rglob("*.xplane.pb"))


def test_run_that_ends_before_its_trace_says_so(tmp_path):
    said = []
    trace = metrics.Trace(tmp_path, 20, said.append)
    trace.before(21)
    trace.close(21)
    assert said == ["No trace: --profile begins with step 30, and this ended after step 21."]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_any_name_can_be_recorded(tmp_path):
    with metrics.Recorder(tmp_path, step=0, evaluated=0, num_steps=8) as recorder:
        recorder.hparams({"dataset": {"name": os.fsdecode(b"caf\xe9")}})
    assert b"caf\\udce9" in b"".join(file.read_bytes() for file in tmp_path.glob("events*"))


def test_other_processes_write_nothing(tmp_path):
    with metrics.Recorder(tmp_path, step=0, evaluated=0, num_steps=8, active=False) as recorder:
        recorder.write(1, 0.1, {"train/loss": 1.0})
        recorder.show(1, {"inputs": None})
        recorder.hparams({"seed": 0})
        recorder.say("nothing")
    assert list(tmp_path.iterdir()) == []
