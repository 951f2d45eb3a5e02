"""A checkpoint is exactly what was saved, or is said to be damaged; saving never loses the one before."""

import errno
import pathlib
import shutil

import jax
import numpy as np
import pytest

import checkpoint
from common.errors import UserError

# Of TensorStore's threads, which outlive a failed reading; `cli` keeps them from the user.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def state(step):
    """A merged state with arrays of several sizes, one of them as a network's, that does not compress."""
    random = np.random.default_rng(step)
    return {
        "params": {"kernel": random.normal(size=(64, 500)).astype(np.float32), "bias": np.zeros(3, np.float32)},
        "step": np.int32(step),
    }


def save(workdir, *steps, errors=(), **meta):
    with checkpoint.Checkpoints(workdir) as checkpoints:
        for step, error in zip(steps, errors or [None] * len(steps), strict=True):
            checkpoints.save(step, state(step), {"note": f"of {step}"} | meta, error)


def latest(workdir):
    """(state, meta) as a run finds them."""
    with checkpoint.Checkpoints(workdir) as checkpoints:
        return checkpoints.restore_latest(state(0))


def assert_is(restored, step):
    jax.tree.map(np.testing.assert_array_equal, restored[0], state(step))
    assert restored[1] == {"note": f"of {step}"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("saved")
    save(workdir, 1, 2, errors=[0.5, 0.25])
    return workdir


def test_what_is_restored_is_what_was_saved(saved):
    assert_is(latest(saved), 2)
    with checkpoint.Checkpoints(saved, read_only=True) as checkpoints:
        assert checkpoints.steps() == [1, 2]
        assert_is(checkpoints.restore(1, state(0)), 1)
        with pytest.raises(UserError, match="of a network of other sizes"):
            checkpoints.restore(1, state(0) | {"params": {"kernel": np.zeros((64, 250)), "bias": np.zeros(3)}})


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip(file):
    """Changes one bit in the middle."""
    content = bytearray(file.read_bytes())
    if content:
        content[len(content) // 2] ^= 16
    file.write_bytes(content)


@pytest.mark.parametrize("damage", [pathlib.Path.unlink, truncate, flip], ids=["missing", "truncated", "one bit"])
def test_any_damage_to_any_file_gives_the_same_state_or_the_one_before(saved, tmp_path, capsys, damage):
    files = [file.relative_to(saved) for file in (saved / "checkpoints/2").rglob("*") if file.is_file()]
    assert len(files) > 8
    passed_over = []
    for number, file in enumerate(files):
        workdir = shutil.copytree(saved, tmp_path / str(number))
        damage(workdir / file)
        restored = latest(workdir)
        said = capsys.readouterr().err
        with checkpoint.Checkpoints(workdir, read_only=True) as checkpoints:
            assert checkpoints.best_step() == checkpoints.steps()[-1]
        if (workdir / "checkpoints/2.damaged").is_dir():
            assert_is(restored, 1)
            assert "warning: the checkpoint of step 2 cannot be read, another is taken" in said
            passed_over.append(file)
        else:
            assert_is(restored, 2)
    size = {file: (saved / file).stat().st_size for file in files}
    assert max(size, key=size.get) in passed_over, "the arrays are in the largest file"


def test_no_byte_of_the_record_can_change_unseen(saved, tmp_path):
    """As one that would lower the learning rate tenfold."""
    record = saved / "checkpoints/2/record/metadata"
    content = record.read_bytes()
    for place in range(0, len(content), 7):
        workdir = shutil.copytree(saved, tmp_path / str(place))
        (workdir / record.relative_to(saved)).write_bytes(
            content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
        )
        assert_is(latest(workdir), 1)


@pytest.mark.parametrize(
    ("error", "raised", "words"),
    [
        (MemoryError("too little"), MemoryError, "too little"),
        (AttributeError("of another version of Orbax"), AttributeError, "another version"),
        (OSError(errno.EMFILE, "Too many open files"), UserError, "step 2 .* cannot be read now: Too many open files"),
        (ValueError("… [os_error_code='12']"), UserError, "step 2 .* cannot be read now: Cannot allocate memory"),
    ],
)
def test_what_says_nothing_of_the_files_sets_nothing_aside(saved, tmp_path, monkeypatch, error, raised, words):
    workdir = shutil.copytree(saved, tmp_path / "run")
    before = sorted(workdir.rglob("*"))

    def restore(*_, **__):
        raise error

    with checkpoint.Checkpoints(workdir) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "restore", restore)
        for read in (checkpoints.restore_latest, checkpoints.restore_best):
            with pytest.raises(raised, match=words):
                read(state(0))
    assert sorted(workdir.rglob("*")) == before


def test_a_defect_while_saving_is_not_blamed_on_the_disk(saved, tmp_path, monkeypatch):
    workdir = shutil.copytree(saved, tmp_path / "run")

    def save(*_, **__):
        raise AttributeError("a defect")

    with checkpoint.Checkpoints(workdir) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", save)
        with pytest.raises(AttributeError, match="a defect"):
            checkpoints.save(2, state(2), {})
    assert_is(latest(workdir), 2)


def test_what_goes_wrong_in_the_background_ends_in_a_sentence(tmp_path, monkeypatch):
    """As a full disk does. Orbax raises it in each thread that waits, and the second must not hide the first."""
    save(tmp_path, 1)
    sentence = r"step 2 cannot be written to .*: No space left on device"
    with pytest.raises(UserError, match=sentence), checkpoint.Checkpoints(tmp_path) as checkpoints:
        wait = checkpoints._manager._wait_for_checkpointers

        def full(*_, **__):
            wait()
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(checkpoints._manager, "_finalize", full)
        checkpoints.save(2, state(2), {})


def test_ctrl_c_while_a_save_begins_is_what_comes_out(tmp_path, monkeypatch):
    save(tmp_path, 1)

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), checkpoint.Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", interrupted)
        checkpoints.save(1, state(1), {}, 0.5)
    monkeypatch.undo()
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1"]


def test_a_damaged_best_gives_way_to_the_next(saved, tmp_path, capsys):
    workdir = shutil.copytree(saved, tmp_path / "run")
    save(workdir, 3, errors=[0.4])
    for file in (workdir / "checkpoints/2/state").rglob("*"):
        if file.is_file():
            truncate(file)
    with checkpoint.Checkpoints(workdir) as checkpoints:
        assert checkpoints.best_step() == 2
        step, restored, _ = checkpoints.restore_best(state(0))
        assert (step, checkpoints.best_step()) == (3, 3)
        jax.tree.map(np.testing.assert_array_equal, restored, state(3))
    assert "step 2 cannot be read" in capsys.readouterr().err


def test_one_of_an_earlier_version_is_not_called_damaged(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    (workdir / "checkpoints/2/record").rename(workdir / "checkpoints/2/meta")
    with pytest.raises(UserError, match=r"step 2 .* was written by an earlier version"):
        latest(workdir)


def test_an_unfinished_checkpoint_is_none(tmp_path):
    (tmp_path / "checkpoints/5.orbax-checkpoint-tmp").mkdir(parents=True)
    assert not checkpoint.exists(tmp_path)
    (tmp_path / "checkpoints/5.replaced").mkdir()
    assert checkpoint.exists(tmp_path)


def test_half_a_copy_is_passed_over_and_set_aside(saved, tmp_path, capsys):
    workdir = shutil.copytree(saved, tmp_path / "run")
    for number, file in enumerate(sorted((workdir / "checkpoints/2").rglob("*"))):
        if file.is_file() and number % 2:
            file.unlink()
    (workdir / "checkpoints/7").mkdir()  # a copy that had just begun
    assert_is(latest(workdir), 1)
    assert "step 7 cannot be read" in capsys.readouterr().err
    assert sorted(path.name for path in (workdir / "checkpoints").iterdir()) == ["1", "2.damaged", "7.damaged"]
    save(workdir, 2, 3)
    assert_is(latest(workdir), 3)
    assert capsys.readouterr().err == ""


def test_where_none_can_be_read_all_stay_as_they_are(saved, tmp_path):
    workdir = shutil.copytree(saved, tmp_path / "run")
    for file in (workdir / "checkpoints").rglob("*"):
        if file.is_file():
            truncate(file)
    before = sorted((workdir / "checkpoints").rglob("*"))
    with pytest.raises(UserError, match=r"No checkpoint in .* can be read \(step 2: .*delete it to start afresh"):
        latest(workdir)
    assert sorted((workdir / "checkpoints").rglob("*")) == before


def test_a_best_checkpoint_whose_record_is_damaged_is_set_aside_and_not_removed(tmp_path, capsys):
    save(tmp_path, 20, 100, 120, errors=[0.2, 0.5, 0.4])
    file = tmp_path / "checkpoints" / "20" / "record" / "metadata"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert_is(checkpoints.restore_latest(state(0)), 120)
        checkpoints.save(140, state(140), {"note": "of 140"}, 0.45)
        checkpoints.wait()
        assert checkpoints.steps() == [120, 140] and checkpoints.best_step() == 120
    assert "the checkpoint of step 20 cannot be read" in capsys.readouterr().err
    assert (tmp_path / "checkpoints" / "20.damaged").is_dir()


def test_the_latest_two_and_the_best_stay(tmp_path):
    save(tmp_path, 1, 2, 3, 4, 5, errors=[0.9, 0.2, 0.5, None, 0.4])
    with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 4, 5]
        assert checkpoints.best_step() == 2


def test_what_a_killed_save_left_too_much_goes_with_the_next_start(tmp_path, monkeypatch):
    """Killed when the newest was complete and the oldest not yet removed, a run may have nothing left to save."""
    save(tmp_path, 1, 2, 3, errors=[0.2, 0.9, 0.5])
    folder = tmp_path / "checkpoints"
    shutil.copytree(folder / "2", tmp_path / "2")
    save(tmp_path, 4)
    shutil.move(tmp_path / "2", folder / "2")
    with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
        checkpoints.restore_latest(state(0))
        assert checkpoints.steps() == [1, 2, 3, 4]
    shutil.copytree(folder, tmp_path / "again" / "checkpoints")
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert_is(checkpoints.restore_latest(state(0)), 4)
        assert checkpoints.steps() == [1, 3, 4], "the best and the latest two"
    assert sorted(path.name for path in folder.iterdir()) == ["1", "3", "4"]
    monkeypatch.setattr(shutil, "rmtree", lambda path, **_: None)  # killed again, as it removes
    with checkpoint.Checkpoints(tmp_path / "again") as checkpoints:
        assert_is(checkpoints.restore_latest(state(0)), 4)
        assert checkpoints.steps() == [1, 3, 4]
    assert (tmp_path / "again" / "checkpoints" / "2.surplus" / "record").is_dir()


def test_a_removal_that_is_cut_short_leaves_no_half_of_a_checkpoint(tmp_path, monkeypatch, capsys):
    """Killed while it removed what was surplus: the next start finds whole checkpoints alone, and says nothing."""
    with monkeypatch.context() as patch, checkpoint.Checkpoints(tmp_path) as checkpoints:
        patch.setattr(shutil, "rmtree", lambda path, **_: None)
        for step, error in ((1, 0.9), (2, 0.2), (3, 0.5), (4, 0.4)):
            checkpoints.save(step, state(step), {"note": f"of {step}"}, error)
            checkpoints.wait()
    folder = tmp_path / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["1.surplus", "2", "3", "4"]
    shutil.rmtree(folder / "1.surplus" / "record")
    with checkpoint.Checkpoints(tmp_path, read_only=True) as checkpoints:
        assert checkpoints.steps() == [2, 3, 4]
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert_is(checkpoints.restore_latest(state(0)), 4)
        assert checkpoints.best_step() == 2
    assert sorted(path.name for path in folder.iterdir()) == ["2", "3", "4"]
    assert capsys.readouterr().err == ""


def test_a_step_is_replaced_without_a_moment_without_it(tmp_path, monkeypatch):
    """Saved before its evaluation, saved again after it; a crash in between leaves the first."""
    save(tmp_path, 1, 2)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", lambda *_, **__: None)  # a crash before anything is written
        monkeypatch.setattr(checkpoints, "_finish", lambda: None)
        checkpoints.save(2, state(2), {"note": "of 2"}, 0.1)
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2.replaced"]
        shutil.copytree(tmp_path, tmp_path.with_name("crashed"))
    assert_is(latest(tmp_path.with_name("crashed")), 2)
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.best_step() is None
    save(tmp_path, 2, errors=[0.1])
    with checkpoint.Checkpoints(tmp_path) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best_step()) == ([1, 2], 2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_nothing_is_pickled(saved):
    """A pickle of protocol 2 or later begins with its number and ends with a full stop; NumPy's files have a magic."""
    for file in saved.rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert content[:1] != b"\x80" and content[:6] != b"\x93NUMPY", file


def test_a_reader_beside_a_run_takes_what_the_run_has_kept(tmp_path, capsys):
    """Steps that the run has removed since the reader's start are no damage."""
    save(tmp_path, 1, 2, 3, errors=[0.3, 0.2, 0.4])
    with (
        checkpoint.Checkpoints(tmp_path, read_only=True) as best,
        checkpoint.Checkpoints(tmp_path, read_only=True) as last,
    ):
        save(tmp_path, 4, 5, errors=[0.5, 0.1])
        assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["4", "5"]
        assert best.restore_best(state(0))[0] == 5
        assert_is(last.restore_latest(state(0)), 5)
    with checkpoint.Checkpoints(tmp_path, read_only=True) as reader:
        for step in (4, 5):  # as a run does while it writes them anew
            (tmp_path / f"checkpoints/{step}").rename(tmp_path / f"checkpoints/{step}.replaced")
        assert reader.restore_best(state(0)) is reader.restore_latest(state(0)) is None
    assert capsys.readouterr().err == ""
