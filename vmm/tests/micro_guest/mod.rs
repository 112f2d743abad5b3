//! Guests of a few instructions, written by hand, that run on `/dev/kvm` in a millisecond.
//!
//! The code is 32-bit protected mode, flat, at 1 MiB, entered as a PVH kernel is. [`Code`] is the assembler: just the
//! instructions that a driver needs. A guest tells the test something by writing to [`REPORT_PORT`], and ends itself by
//! writing to [`END_PORT`].

#![allow(
    dead_code,
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a helper of tests, of which each uses a part"
)]

use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use vm_memory::{Bytes, GuestAddress};
use vmm::boot::{Entry, registers};
use vmm::bus::{Bus, BusDevice};
use vmm::layout;
use vmm::memory::{Pages, Ram, RamOptions};
use vmm::pci::{Cf8, Ecam, PciBus, Window};
use vmm::vcpu::{Gate, VcpuContext, VcpuEvents, VcpuFault, Vcpus};
use vmm::vm::{Vm, open_kvm};

/// Dwords written here are kept for the test.
pub(crate) const REPORT_PORT: u16 = 0x500;
/// A write here ends the guest.
pub(crate) const END_PORT: u16 = 0x504;

/// A program for a micro-guest.
#[derive(Default)]
pub(crate) struct Code(Vec<u8>);

impl Code {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    fn address(address: u64) -> [u8; 4] {
        u32::try_from(address)
            .expect("micro-guests address 4 GiB")
            .to_le_bytes()
    }

    /// `mov byte [address], value`
    pub(crate) fn store8(self, address: u64, value: u8) -> Self {
        self.raw(&[0xc6, 0x05]).raw(&Self::address(address)).raw(&[value])
    }

    /// `mov word [address], value`
    pub(crate) fn store16(self, address: u64, value: u16) -> Self {
        self.raw(&[0x66, 0xc7, 0x05])
            .raw(&Self::address(address))
            .raw(&value.to_le_bytes())
    }

    /// `mov dword [address], value`
    pub(crate) fn store32(self, address: u64, value: u32) -> Self {
        self.raw(&[0xc7, 0x05])
            .raw(&Self::address(address))
            .raw(&value.to_le_bytes())
    }

    /// `mov eax, [address]`
    pub(crate) fn load32(self, address: u64) -> Self {
        self.raw(&[0xa1]).raw(&Self::address(address))
    }

    /// `mov dx, port; mov eax, value; out dx, eax`
    pub(crate) fn out32(self, port: u16, value: u32) -> Self {
        self.port(port)
            .raw(&[0xb8])
            .raw(&value.to_le_bytes())
            .raw(&[0xef])
    }

    /// `mov dx, port; out dx, eax`
    pub(crate) fn out_eax(self, port: u16) -> Self {
        self.port(port).raw(&[0xef])
    }

    /// `mov dx, port; in eax, dx`
    pub(crate) fn in32(self, port: u16) -> Self {
        self.port(port).raw(&[0xed])
    }

    /// `mov dx, port`
    pub(crate) fn port(self, port: u16) -> Self {
        self.raw(&[0x66, 0xba]).raw(&port.to_le_bytes())
    }

    /// Reports EAX to the test.
    pub(crate) fn report(self) -> Self {
        self.out_eax(REPORT_PORT)
    }

    /// Ends the guest.
    pub(crate) fn end(self) -> Self {
        // After the write the vCPU does not come back; the loop is for a VMM that is wrong.
        self.out32(END_PORT, 0).raw(&[0xf4, 0xeb, 0xfd])
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

/// What a guest reported and how it ended.
#[derive(Debug, Default)]
pub(crate) struct Report {
    pub(crate) values: Vec<u32>,
    pub(crate) ended: bool,
    pub(crate) fault: Option<VcpuFault>,
}

struct Ports {
    report: Arc<Mutex<Report>>,
    gate: Arc<Gate>,
}

impl BusDevice for Ports {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0xff);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut report = self.report.lock().unwrap();
        if offset == u64::from(END_PORT - REPORT_PORT) {
            report.ended = true;
            self.gate.close();
        } else {
            let mut value = [0; 4];
            value[..data.len().min(4)].copy_from_slice(&data[..data.len().min(4)]);
            report.values.push(u32::from_le_bytes(value));
        }
    }
}

impl VcpuEvents for Ports {
    fn fault(&self, fault: VcpuFault) {
        self.report.lock().unwrap().fault = Some(fault);
    }
}

/// A machine for micro-guests: 32 MiB of memory, one vCPU, a PCI bus.
pub(crate) struct Machine {
    pub(crate) vm: Arc<Vm>,
    pub(crate) ram: Ram,
    pub(crate) pci: Arc<PciBus>,
    pub(crate) ports: Arc<Bus>,
    pub(crate) mmio: Arc<Bus>,
    gate: Arc<Gate>,
    report: Arc<Mutex<Report>>,
    control: Arc<Ports>,
}

impl Machine {
    /// `None` where this host has no `/dev/kvm`; the test says so.
    pub(crate) fn new() -> Option<Self> {
        if !std::path::Path::new("/dev/kvm").exists() {
            eprintln!("skipped: no /dev/kvm");
            return None;
        }
        let vm = Arc::new(Vm::new(open_kvm().expect("/dev/kvm")).expect("KVM"));
        let options = RamOptions {
            size: 32 << 20,
            pages: Pages::Small,
            shared: false,
            prefault: false,
        };
        let ram = Ram::new(options).expect("memory");
        vm.set_memory(&ram).expect("memory slots");
        let pci = Arc::new(PciBus::new());
        let (ports, mmio, gate) = (Arc::new(Bus::new()), Arc::new(Bus::new()), Arc::new(Gate::new()));
        let report = Arc::new(Mutex::new(Report::default()));
        let control = Arc::new(Ports {
            report: report.clone(),
            gate: gate.clone(),
        });
        ports
            .insert(
                "test",
                u64::from(REPORT_PORT)..u64::from(END_PORT) + 4,
                control.clone(),
            )
            .expect("ports");
        let cf8 = u64::from(layout::PORT_PCI_CONFIG_ADDRESS);
        ports
            .insert("cf8", cf8..cf8 + 8, Arc::new(Cf8::new(pci.clone())))
            .expect("ports");
        let window = layout::MMIO32;
        let device = Window {
            bus: pci.clone(),
            base: window.start,
        };
        mmio.insert("window", window.start..window.end(), Arc::new(device))
            .expect("window");
        mmio.insert(
            "ecam",
            layout::ECAM.start..layout::ECAM.end(),
            Arc::new(Ecam(pci.clone())),
        )
        .expect("ecam");
        Some(Machine {
            vm,
            ram,
            pci,
            ports,
            mmio,
            gate,
            report,
            control,
        })
    }

    /// Runs `code` until it ends itself, at most ten seconds.
    pub(crate) fn run(self, code: &Code) -> Report {
        self.run_for(code, Duration::from_secs(10))
    }

    /// Runs `code` until it ends itself, at most for `limit`.
    pub(crate) fn run_for(self, code: &Code, limit: Duration) -> Report {
        let memory = self.ram.memory();
        memory
            .write_slice(code.bytes(), GuestAddress(layout::KERNEL_START))
            .expect("code");
        let entry = Entry::Pvh {
            address: layout::KERNEL_START,
        };
        registers::write_tables(memory, entry).expect("tables");
        let vcpu = self.vm.create_vcpu(0).expect("vCPU");
        registers::set_up(&vcpu, entry).expect("registers");
        let context = VcpuContext {
            ports: self.ports.clone(),
            mmio: self.mmio.clone(),
            events: self.control.clone(),
            on_start: Arc::new(|_| Ok(())),
        };
        let mut vcpus = Vcpus::start(vec![vcpu], self.gate.clone(), &context).expect("vCPU thread");
        vcpus.resume();
        let started = Instant::now();
        let over = |report: &Report| report.ended || report.fault.is_some();
        while !over(&self.report.lock().unwrap()) && started.elapsed() < limit {
            std::thread::sleep(Duration::from_millis(1));
        }
        vcpus.stop();
        std::mem::take(&mut self.report.lock().unwrap())
    }
}
