"""Holds a virtual machine with a vCPU that never runs, so that the kernel does not patch its code.

The kernel patches its own code (static keys) when the first virtual machine is created and the last
one removed (preempt_notifier_inc() in virt/kvm/kvm_main.c), and when the first vCPU's APIC is
turned off and the last one's on (apic_sw_disabled in arch/x86/kvm/lapic.c). Under TCG the other CPU
of an emulated host can hit the breakpoint of such a patch: "Oops: int3". While this program runs,
nothing is patched. It creates the file in its argument when it is ready.

Source: Linux Documentation/virt/kvm/api.rst.
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
# Wait for the last patch before any KVM code runs.
time.sleep(1)
Path(sys.argv[1]).touch()
signal.pause()
