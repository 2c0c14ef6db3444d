"""Real KVM on any machine: an emulated host with AMD's virtualization, in which the tests run.

`script/test-kvm` boots it (host.py) from segments (images.py), runs in it what it is told (inside),
brings results and logs back, and judges them (verdict.py). Not here: the tests.
"""
