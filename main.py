"""Trains a network: `python main.py --config=configs/alexnet.py --workdir=runs/alexnet [--config.FIELD=VALUE …]`."""

import os

from absl import flags

from common import cli, exits, host

CONFIG = cli.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run: config, metrics, TensorBoard logs, checkpoints.")
PROFILE = flags.DEFINE_bool("profile", False, "Also write a trace of steps 10 to 14 after the start, for XProf.")
CPU_DEVICES = flags.DEFINE_integer(
    "cpu_devices", 0, "Devices to simulate on the CPU; 0 makes two where it has several cores.", lower_bound=0
)
COORDINATOR = flags.DEFINE_string(
    "coordinator_address", "", "HOST:PORT of process 0, or auto; SLURM and TPU need none."
)
NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "How many processes take part.", lower_bound=0)
PROCESS_ID = flags.DEFINE_integer("process_id", -1, "The number of this process, from 0.")
flags.mark_flags_as_required(["config", "workdir"])


def main(_) -> int | None:
    """Sets the platform up and trains."""
    exits.outlive_readers()
    # TensorFlow prints notices at import, which do not help a user.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "0")
    import jax

    if CPU_DEVICES.value:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", CPU_DEVICES.value)
    host.keep_freed_memory()
    from run import processes

    processes.initialize(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value)
    import train

    return train.train(CONFIG.value, WORKDIR.value, profile=PROFILE.value)


if __name__ == "__main__":
    cli.run(main)
