"""Holds one empty virtual machine open (KVM_CREATE_VM, Linux Documentation/virt/kvm/api.rst).

The kernel patches its own code when the first virtual machine comes and when the last one goes
(preempt_notifier_inc() in virt/kvm/kvm_main.c flips a static key). Under TCG the other processor of
an emulated host can run into the breakpoint of that patch: "Oops: int3" in __schedule().
"""

import fcntl
import os
import signal

KVM_CREATE_VM = 0xAE01

fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC), KVM_CREATE_VM, 0)
signal.pause()
