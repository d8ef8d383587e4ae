"""Several processes of one command on this machine, as a pod would run it: what it runs on, one attempt, and its babysitter."""

from lmeff.launch.babysit import launch
from lmeff.launch.local import Stopped
from lmeff.launch.machine import Machine, Share, simulate_devices, this_command

__all__ = ["Machine", "Share", "Stopped", "launch", "simulate_devices", "this_command"]
