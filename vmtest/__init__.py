"""Runs the tests under real KVM on any machine, in an emulated host with AMD's virtualization.

`script/test-kvm` boots the host (host.py) from segments (images.py), runs a job in it (jobs.py,
inside), fetches results and logs, and judges them (verdict.py). Not here: the tests.
"""
