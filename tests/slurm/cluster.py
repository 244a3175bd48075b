"""A private Slurm of one node for the tests: ``python -m tests.slurm.cluster install|start|stop``.

Debian's packages, started by hand as root: munge, the controller and the node's daemon, without systemd, cgroups and
accounting (the launcher asks ``squeue`` alone), bound to the host name's address, which has to be a loopback one. All
state lies in one folder; clients need ``SLURM_CONF``.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

PACKAGES = ("munge", "slurmctld", "slurmd", "slurm-client")
COMMANDS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel", "scontrol", "sinfo")
SBIN = "/usr/sbin:/sbin"
DEFAULT = Path(os.environ.get("TMPDIR", "/tmp")) / f"chai-slurm-{os.getuid()}"

CONF = """\
ClusterName=chai
SlurmctldHost={host}({address})
SlurmctldPort={controller}
SlurmdPort={daemon}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
# A job that is queued again waits until the credentials of its last start have expired: 2 minutes if it isn't said.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoCtldInAddrAny,NoInAddrAny
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
JobAcctGatherType=jobacct_gather/none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
MailProg=/bin/true
SelectType=select/cons_tres
# Cores are counted, memory isn't.
SelectTypeParameters=CR_CPU
EnforcePartLimits=ALL
SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2
# The node has as many cores as it says here, whatever the machine has.
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=5
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
NodeName={host} NodeAddr={address} CPUs={cores} RealMemory={memory} State=UNKNOWN
PartitionName=low Nodes={host} Default=YES PriorityTier=1 GraceTime=20 MaxTime=INFINITE DefaultTime=10 OverSubscribe=NO
PartitionName=high Nodes={host} PriorityTier=2 PreemptMode=OFF MaxTime=INFINITE DefaultTime=10
"""


class ClusterError(RuntimeError):
    """There can be no Slurm here; says why."""


def missing() -> list[str]:
    """The commands that aren't installed."""
    path = f"{os.environ.get('PATH', '')}:{SBIN}"
    return [command for command in COMMANDS if shutil.which(command, path=path) is None]


def install() -> None:
    """Install Debian's packages, without letting them start daemons of their own.

    Raises:
        ClusterError: not root, no apt-get, or it fails.
    """
    if not missing():
        return
    if os.getuid() != 0:
        raise ClusterError("Slurm isn't installed, and only root can install it")
    if shutil.which("apt-get") is None:
        raise ClusterError("Slurm isn't installed, and there is no apt-get to install it with")
    policy = Path("/usr/sbin/policy-rc.d")
    own = not policy.exists()
    if own:
        policy.write_text("#!/bin/sh\nexit 101\n")
        policy.chmod(0o755)
    apt = ["apt-get", "-q", "-o", "DPkg::Lock::Timeout=120"]
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    try:
        wanted = [*apt, "install", "-y", "--no-install-recommends", *PACKAGES]
        for command in (wanted, [*apt, "update"], wanted):
            subprocess.run(command, env=environment, capture_output=True, timeout=600, check=False)
            if not missing():
                return
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ClusterError(f"apt-get can't install Slurm: {error}") from None
    finally:
        if own:
            policy.unlink(missing_ok=True)
    raise ClusterError(f"apt-get can't install {', '.join(PACKAGES)}")


class Cluster:
    """One node with a few cores.

    Args:
        folder: for all state; its path is short, for the sockets in it.
        cores: jobs of one core that run at once; may be more than the machine has.
    """

    def __init__(self, folder: Path = DEFAULT, cores: int = 4) -> None:
        self.folder, self.cores = folder, cores
        self.conf = folder / "slurm.conf"
        self.environment = {
            **os.environ,
            "SLURM_CONF": str(self.conf),
            "PATH": f"{os.environ.get('PATH', '')}:{SBIN}",
        }

    def start(self) -> None:
        """Write the configuration and start the daemons; returns when jobs can run.

        Raises:
            ClusterError: says what is wrong.
        """
        if os.getuid() != 0:
            raise ClusterError("Slurm's daemons are started as root")
        if lacking := missing():
            raise ClusterError(f"not installed: {', '.join(lacking)}")
        host = socket.gethostname().partition(".")[0]
        try:
            address = socket.gethostbyname(socket.gethostname())
        except OSError:
            address = ""
        if not address.startswith("127."):
            raise ClusterError(f"the host name {host} has to stand for a loopback address in /etc/hosts")
        self.stop()
        shutil.rmtree(self.folder, ignore_errors=True)
        for name in ("state", "spool"):
            (self.folder / name).mkdir(parents=True)
        self.folder.chmod(0o755)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        controller, daemon = _free_ports(address, 2)
        memory = int(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2**20)
        self.conf.write_text(
            CONF.format(
                host=host,
                address=address,
                controller=controller,
                daemon=daemon,
                folder=self.folder,
                cores=self.cores,
                memory=memory,
            )
        )
        files = {"key-file": key, "socket": "munge.sock", "pid-file": "munged.pid", "log-file": "munged.log"}
        files["seed-file"] = "munge.seed"
        self._daemon("munged", *(f"--{name}={self.folder / file}" for name, file in files.items()))
        self._wait("munged", lambda: (self.folder / "munge.sock").exists())
        self._daemon("slurmctld")
        self._wait("slurmctld", lambda: self.run("scontrol", "ping").returncode == 0)
        self._daemon("slurmd")
        self._wait("slurmd", lambda: self.run("sinfo", "-h", "-o", "%t").stdout.split()[:1] == ["idle"])

    def stop(self) -> None:
        """Cancel what runs and stop the daemons that this folder's process ids name."""
        if self.conf.exists() and self._pid("slurmctld") is not None:
            self.run("scancel", "--user=root", timeout=20)
            end = time.monotonic() + 15
            while self.run("squeue", "-h").stdout.strip() and time.monotonic() < end:
                time.sleep(0.2)
        for name in ("slurmd", "slurmctld", "munged"):
            pid = self._pid(name)
            for number in (signal.SIGTERM, signal.SIGKILL):
                if pid is None:
                    break
                os.kill(pid, number)
                end = time.monotonic() + 15
                while (pid := self._pid(name)) is not None and time.monotonic() < end:
                    time.sleep(0.1)

    def run(self, *command: str, timeout: float = 30) -> subprocess.CompletedProcess[str]:
        """One of Slurm's commands, or any other that is to find this cluster."""
        return subprocess.run(
            command, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def _daemon(self, name: str, *arguments: str) -> None:
        with open(self.folder / f"{name}.out", "ab") as log:
            subprocess.run(
                [name, *arguments], env=self.environment, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=log,
                stderr=log, timeout=30, check=False,
            )  # fmt: skip

    def _wait(self, name: str, ready: Callable[[], bool], seconds: float = 60) -> None:
        end = time.monotonic() + seconds
        while not ready():
            if time.monotonic() > end:
                logs = [self.folder / f"{name}{suffix}" for suffix in (".out", ".log")]
                told = " ".join(" ".join(log.read_text().splitlines()[-5:]) for log in logs if log.exists())
                self.stop()
                raise ClusterError(f"{name} doesn't start: {told}")
            time.sleep(0.2)

    def _pid(self, name: str) -> int | None:
        """The process of a daemon that this class started, if it lives."""
        try:
            pid = int((self.folder / f"{name}.pid").read_text())
            if Path(f"/proc/{pid}/comm").read_text().strip() != name:
                return None
            command = Path(f"/proc/{pid}/environ").read_bytes()
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (OSError, ValueError):
            return None
        return pid if f"SLURM_CONF={self.conf}".encode() in command.split(b"\0") and state != "Z" else None


def _free_ports(address: str, count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for one in sockets:
            one.bind((address, 0))
        return [one.getsockname()[1] for one in sockets]
    finally:
        for one in sockets:
            one.close()


def main(arguments: list[str]) -> int:
    """The command line; returns the exit code."""
    cluster = Cluster()
    try:
        if arguments == ["install"]:
            install()
        elif arguments == ["start"]:
            cluster.start()
            print(f"export SLURM_CONF={cluster.conf}")
        elif arguments == ["stop"]:
            cluster.stop()
        else:
            print("usage: python -m tests.slurm.cluster install|start|stop", file=sys.stderr)
            return 2
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
