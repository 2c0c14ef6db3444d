"""Holds one virtual machine with a processor that never runs (KVM's API: virt/kvm/api.rst).

The kernel patches its own code (static keys) when the first virtual machine comes and the last one
goes (preempt_notifier_inc() in virt/kvm/kvm_main.c), and when the first processor's APIC is off and
the last one's is on (apic_sw_disabled in arch/x86/kvm/lapic.c). Under TCG the other processor of an
emulated host can run into the breakpoint of such a patch: "Oops: int3". As long as these are held
nothing is patched. The file that is the argument is made when they are.
"""

import fcntl
import os
import signal
import sys
import time
from pathlib import Path

KVM_CREATE_VM, KVM_CREATE_IRQCHIP, KVM_CREATE_VCPU = 0xAE01, 0xAE60, 0xAE41

machine = fcntl.ioctl(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC), KVM_CREATE_VM, 0)
fcntl.ioctl(machine, KVM_CREATE_IRQCHIP, 0)
fcntl.ioctl(machine, KVM_CREATE_VCPU, 0)
# Nothing of KVM runs yet that could meet the last patch.
time.sleep(1)
Path(sys.argv[1]).touch()
signal.pause()
