//! virtio over PCI on a KVM machine: a guest's accesses to configuration space, registers, MSI-X tables and doorbells, and a
//! device that insists on what the transport promises it.

use std::sync::{Arc, Mutex, OnceLock};

use arbitrary::Unstructured;
use virtio_core::virtio_queue::QueueT;
use virtio_core::{Activation, ActiveQueue, DeviceError, DeviceEvents, GuestMemory, VirtioDevice, feature};
use vmm::bus::Bus;
use vmm::layout;
use vmm::pci::{Cf8, Ecam, PciBus, PciFunction, Window};
use vmm::transport::{BAR_SIZE, TransportEvents, VirtioPci};
use vmm::vm::{Vm, open_kvm};

use crate::memory::{HIGH_SIZE, HIGH_START, LOW_SIZE, guest_memory};

/// Where the device's BAR is at first, and its doors to configuration space.
const WINDOW: u64 = 0x1_4000_0000;
const WINDOW_SIZE: u64 = 1 << 30;
const BAR: u64 = WINDOW + BAR_SIZE;
const SLOT: u8 = 1;
const FUNCTION: u64 = layout::ECAM.start + ((SLOT as u64) << 15);

/// Places in the BAR.
const STATUS: u64 = 0x14;
const ISR: u64 = 0x1000;
const DEVICE: u64 = 0x2000;
const DOORBELLS: u64 = 0x3000;
const MSIX_TABLE: u64 = 0x8000;
const MSIX_PENDING: u64 = 0x1_0000;

const SIZES: [u16; 3] = [8, 64, 256];
const FEATURES: u64 = feature::RING_INDIRECT_DESC | feature::RING_EVENT_IDX | 0xff;

/// The KVM machine of this process, without memory and vCPUs; none where there is no usable KVM.
fn vm() -> Option<&'static Arc<Vm>> {
    static VM: OnceLock<Option<Arc<Vm>>> = OnceLock::new();
    VM.get_or_init(|| Vm::new(open_kvm().ok()?).ok().map(Arc::new))
        .as_ref()
}

pub(super) fn is_possible() -> bool {
    vm().is_some()
}

/// What device and test share.
#[derive(Default)]
struct State {
    active: bool,
    /// So often is it asked yet before it is idle.
    draining: u8,
    /// Its next activation fails.
    fails: bool,
    /// How long it drains after a reset.
    lingers: u8,
    queues: Vec<ActiveQueue>,
    /// Of this life and earlier ones.
    events: Vec<Arc<dyn DeviceEvents>>,
}

struct Probe {
    memory: GuestMemory,
    state: Arc<Mutex<State>>,
}

impl VirtioDevice for Probe {
    fn device_type(&self) -> u32 {
        virtio_core::device_type::ENTROPY
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &SIZES
    }

    fn features(&self) -> u64 {
        FEATURES
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        assert!((1..=8).contains(&data.len()));
        virtio_core::read_config_bytes(b"config", offset, data);
    }

    fn write_config(&mut self, _offset: u64, data: &[u8]) {
        assert!((1..=8).contains(&data.len()));
    }

    fn activate(&mut self, activation: Activation) -> Result<(), DeviceError> {
        let mut state = self.state.lock().unwrap();
        assert!(!state.active && state.draining == 0, "activated while it runs");
        assert_eq!(activation.features & !(FEATURES | feature::VERSION_1), 0);
        assert!(activation.has(feature::VERSION_1));
        assert!(activation.queues.is_sorted_by_key(|queue| queue.index));
        for queue in &activation.queues {
            assert!(queue.queue.is_valid(&*self.memory), "a ring outside of memory");
            let size = queue.queue.size();
            assert!(size.is_power_of_two() && size <= SIZES[usize::from(queue.index)]);
        }
        // What fails half-way is reset as well.
        state.active = true;
        state.queues = activation.queues;
        state.events.push(activation.events);
        if std::mem::take(&mut state.fails) {
            return Err(DeviceError::MissingQueues {
                enabled: 0,
                needed: 1,
            });
        }
        Ok(())
    }

    fn reset(&mut self) {
        let mut state = self.state.lock().unwrap();
        if state.active {
            state.active = false;
            state.draining = state.lingers;
            state.queues.clear();
        }
    }

    fn is_idle(&mut self) -> bool {
        let mut state = self.state.lock().unwrap();
        state.draining = state.draining.saturating_sub(1);
        !state.active && state.draining == 0
    }
}

struct Quiet;

impl TransportEvents for Quiet {
    fn activated(&self) {}
    fn needs_reset(&self, reason: &str) {
        assert!(!reason.is_empty());
    }
}

struct Bench {
    pci: Arc<PciBus>,
    ports: Bus,
    mmio: Bus,
    function: Arc<VirtioPci>,
    state: Arc<Mutex<State>>,
}

pub(super) fn run(input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
    let Some(vm) = vm() else { return Ok(()) };
    let mut bench = Bench::new(vm);
    while !input.is_empty() {
        match input.int_in_range(0..=15_u8)? {
            0..=2 => bench.write_field(input)?,
            3 => bench.bring_up(input)?,
            4 => bench.access_bar(input)?,
            5 => bench.configure(input)?,
            6 => bench.use_window(input)?,
            7 | 8 => bench.program_vector(input)?,
            9 => bench.enable_msix(input)?,
            10 => bench.move_bar(input)?,
            11 => bench.device_acts(input)?,
            12 => bench.write(STATUS, &[0]),
            13 => bench.write(DOORBELLS + 2 * input.int_in_range(0..=16)?, &[0; 2]),
            14 => bench.replug(vm, input)?,
            _ => {
                let mut state = bench.state.lock().unwrap();
                (state.lingers, state.fails) = (input.int_in_range(0..=3)?, input.ratio(1, 4)?);
            }
        }
        bench.assert_sound();
    }
    bench.works_afterwards();
    Ok(())
}

impl Bench {
    fn new(vm: &Arc<Vm>) -> Self {
        let pci = Arc::new(PciBus::new());
        let (ports, mmio) = (Bus::new(), Bus::new());
        let cf8 = u64::from(layout::PORT_PCI_CONFIG_ADDRESS);
        ports
            .insert("CF8", cf8..cf8 + 8, Arc::new(Cf8::new(pci.clone())))
            .unwrap();
        let ecam = layout::ECAM;
        mmio.insert("ECAM", ecam.start..ecam.end(), Arc::new(Ecam(pci.clone())))
            .unwrap();
        for (base, size) in [(layout::MMIO32.start, layout::MMIO32.size), (WINDOW, WINDOW_SIZE)] {
            let bus = pci.clone();
            mmio.insert("window", base..base + size, Arc::new(Window { bus, base }))
                .unwrap();
        }
        let (function, state) = Self::plug(vm, &pci);
        let bench = Self {
            pci,
            ports,
            mmio,
            function,
            state,
        };
        bench.enable_memory();
        bench
    }

    fn plug(vm: &Arc<Vm>, pci: &PciBus) -> (Arc<VirtioPci>, Arc<Mutex<State>>) {
        let state = Arc::<Mutex<State>>::default();
        let memory = guest_memory();
        let device = Probe {
            memory: memory.clone(),
            state: state.clone(),
        };
        let function =
            VirtioPci::new(vm.clone(), memory, false, Box::new(device), BAR, Arc::new(Quiet)).unwrap();
        let function = Arc::new(function);
        pci.insert(SLOT, function.clone()).unwrap();
        (function, state)
    }

    fn enable_memory(&self) {
        self.mmio.write(FUNCTION + 4, &2_u16.to_le_bytes());
        self.mmio.write(FUNCTION + 0x10, &(BAR as u32).to_le_bytes());
        self.mmio
            .write(FUNCTION + 0x14, &((BAR >> 32) as u32).to_le_bytes());
    }

    /// An access to the BAR, wherever it is.
    fn write(&self, offset: u64, data: &[u8]) {
        self.function.bar_write(offset, data);
    }

    fn read<const N: usize>(&self, offset: u64) -> [u8; N] {
        let mut data = [0; N];
        self.function.bar_read(offset, &mut data);
        data
    }

    /// A field of the common configuration, mostly in its width and with a value that means something.
    fn write_field(&self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let (offset, width) = *input.choose(&[
            (0x00, 4),
            (0x08, 4),
            (0x0c, 4),
            (0x10, 2),
            (0x14, 1),
            (0x16, 2),
            (0x18, 2),
            (0x1a, 2),
            (0x1c, 2),
            (0x20, 8),
            (0x24, 4),
            (0x28, 8),
            (0x30, 4),
        ])?;
        let value = match input.int_in_range(0..=3_u8)? {
            0 => input.arbitrary()?,
            1 => 1 << input.int_in_range(0..=15_u64)?,
            2 => *input.choose(&[
                0,
                0x1000,
                LOW_SIZE - 64,
                LOW_SIZE,
                HIGH_START,
                HIGH_START + HIGH_SIZE - 16,
                u64::MAX,
            ])?,
            _ => input.int_in_range(0..=15)?,
        };
        let width = if input.ratio(1, 8)? {
            input.int_in_range(1..=8)?
        } else {
            width
        };
        self.write(offset, &value.to_le_bytes()[..width]);
        Ok(())
    }

    /// The steps of a driver (virtio 1.2 §3.1.1), each of which may be left out.
    fn bring_up(&self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let mut steps: Vec<(u64, Vec<u8>)> = vec![(STATUS, vec![0]), (STATUS, vec![1]), (STATUS, vec![3])];
        for half in [0_u32, 1] {
            steps.push((0x08, half.to_le_bytes().into()));
            let accepted = if half == 0 {
                input.int_in_range(0..=0xff)?
            } else {
                1
            };
            steps.push((0x0c, u32::to_le_bytes(accepted).into()));
        }
        steps.push((STATUS, vec![0xb]));
        for queue in 0..3_u16 {
            steps.push((0x16, queue.to_le_bytes().into()));
            steps.push((0x18, (4_u16 << queue).to_le_bytes().into()));
            steps.push((0x1a, queue.to_le_bytes().into()));
            for (field, place) in [(0x20, 0), (0x28, 0x400), (0x30, 0x800)] {
                let address = 0x1000 * (u64::from(queue) + 1) + place;
                steps.push((field, address.to_le_bytes().into()));
            }
            steps.push((0x1c, 1_u16.to_le_bytes().into()));
        }
        steps.push((STATUS, vec![0xf]));
        let skips = input.ratio(1, 4)?;
        for (offset, data) in steps {
            if !(skips && input.ratio(1, 16)?) {
                self.write(offset, &data);
            }
        }
        Ok(())
    }

    /// Any access to any place of the BAR.
    fn access_bar(&self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let bases = [0, ISR, DEVICE, DOORBELLS, MSIX_TABLE, MSIX_PENDING, BAR_SIZE - 8];
        let offset = if input.ratio(1, 4)? {
            input.int_in_range(0..=BAR_SIZE - 1)?
        } else {
            input.choose(&bases)? + input.int_in_range(0..=7)?
        };
        let mut data = vec![0; input.int_in_range(1..=8)?];
        input.fill_buffer(&mut data)?;
        let at = self
            .function
            .bar()
            .map_or(BAR, |range| range.start)
            .wrapping_add(offset);
        if input.arbitrary()? {
            self.mmio.write(at, &data);
        } else {
            self.mmio.read(at, &mut data);
        }
        Ok(())
    }

    /// Any aligned access to configuration space.
    fn configure(&self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let width = *input.choose(&[1_u64, 2, 4])?;
        let register = input.int_in_range(0..=0xff_u64)? & !(width - 1);
        let mut data = vec![0; width as usize];
        input.fill_buffer(&mut data)?;
        if input.arbitrary()? {
            self.mmio.write(FUNCTION + register, &data);
        } else {
            let address = 1 << 31 | u32::from(SLOT) << 11 | (register & 0xfc) as u32;
            let port = u64::from(layout::PORT_PCI_CONFIG_DATA) + (register & 3);
            self.ports
                .write(layout::PORT_PCI_CONFIG_ADDRESS.into(), &address.to_le_bytes());
            self.ports.read(port, &mut data);
        }
        Ok(())
    }

    /// The offset of the last capability, which is the configuration access window (§4.1.4.9), and that of MSI-X.
    fn capabilities(&self) -> (u64, u64) {
        let (mut window, mut msix) = (0, 0);
        let mut at = u64::from(self.config::<1>(0x34)[0]);
        for _ in 0..16 {
            if at == 0 {
                break;
            }
            let [kind, next, _, virtio] = self.config(at);
            match (kind, virtio) {
                (0x09, 5) => window = at,
                (0x11, _) => msix = at,
                _ => {}
            }
            at = next.into();
        }
        assert!(window != 0 && msix != 0, "a capability is lost");
        (window, msix)
    }

    fn config<const N: usize>(&self, register: u64) -> [u8; N] {
        let mut data = [0; N];
        self.mmio.read(FUNCTION + register, &mut data);
        data
    }

    /// Registers through configuration space.
    fn use_window(&self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let window = FUNCTION + self.capabilities().0;
        let bar = if input.ratio(1, 8)? { input.arbitrary()? } else { 0 };
        let places = [
            0x14,
            ISR as u32,
            DEVICE as u32,
            DOORBELLS as u32,
            MSIX_TABLE as u32,
            BAR_SIZE as u32 - 1,
        ];
        let place: u32 = if input.ratio(1, 4)? {
            input.arbitrary()?
        } else {
            *input.choose(&places)?
        };
        let length: u32 = if input.ratio(1, 8)? {
            input.arbitrary()?
        } else {
            *input.choose(&[1, 2, 4])?
        };
        self.mmio.write(window + 4, &[bar]);
        self.mmio.write(window + 8, &place.to_le_bytes());
        self.mmio.write(window + 12, &length.to_le_bytes());
        let width = *input.choose(&[1_usize, 2, 4])?;
        let mut data = [0; 4];
        input.fill_buffer(&mut data)?;
        if input.arbitrary()? {
            self.mmio.write(window + 16, &data[..width]);
        } else {
            self.mmio.read(window + 16, &mut data[..width]);
        }
        Ok(())
    }

    /// An entry of the MSI-X table, mostly as an operating system writes it.
    fn program_vector(&self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let entry = MSIX_TABLE + 16 * input.int_in_range(0..=4)?;
        let address: u64 = if input.ratio(1, 4)? {
            input.arbitrary()?
        } else {
            0xfee0_0000
        };
        let masked = u32::from(input.ratio(1, 3)?);
        self.write(entry, &address.to_le_bytes());
        self.write(entry + 8, &u32::from(input.arbitrary::<u16>()?).to_le_bytes());
        self.write(entry + 12, &masked.to_le_bytes());
        if entry < MSIX_TABLE + 16 * 4 {
            assert_eq!(self.read(entry), address.to_le_bytes());
        }
        let source = input.int_in_range(0..=4_u16)?;
        self.write(0x16, &source.to_le_bytes());
        self.write(
            if source == 4 { 0x10 } else { 0x1a },
            &input.int_in_range(0..=5_u16)?.to_le_bytes(),
        );
        Ok(())
    }

    fn enable_msix(&self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let control = *input.choose(&[0x8000_u16, 0x8000, 0xc000, 0])?;
        let place = FUNCTION + self.capabilities().1 + 2;
        self.mmio.write(place, &control.to_le_bytes());
        Ok(())
    }

    fn move_bar(&self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let address = match input.int_in_range(0..=3_u8)? {
            0 => input.arbitrary()?,
            1 => 0,
            2 => layout::MMIO32.start,
            _ => WINDOW + BAR_SIZE * u64::from(input.arbitrary::<u8>()?),
        };
        self.mmio.write(FUNCTION + 0x10, &(address as u32).to_le_bytes());
        self.mmio
            .write(FUNCTION + 0x14, &((address >> 32) as u32).to_le_bytes());
        self.mmio
            .write(FUNCTION + 4, &[if input.ratio(1, 4)? { 0 } else { 2 }]);
        Ok(())
    }

    /// The device interrupts, changes, gives up; perhaps too late.
    fn device_acts(&self, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        let state = self.state.lock().unwrap();
        if let Some(queue) = state.queues.first() {
            queue.call.write(1).unwrap();
        }
        if state.events.is_empty() {
            return Ok(());
        }
        let events = input.choose(&state.events)?.clone();
        drop(state);
        if input.arbitrary()? {
            events.config_changed();
        } else {
            events.needs_reset("as the test wants it");
        }
        Ok(())
    }

    /// Takes the device out, perhaps while it runs, and puts a new one in.
    fn replug(&mut self, vm: &Arc<Vm>, input: &mut Unstructured<'_>) -> arbitrary::Result<()> {
        assert!(self.pci.remove(SLOT).is_some());
        if input.arbitrary()? {
            self.write(STATUS, &[0]);
        }
        self.function.stop();
        for _ in 0..8 {
            self.function.is_idle();
        }
        assert!(self.function.is_idle());
        let state = self.state.clone();
        (self.function, self.state) = Self::plug(vm, &self.pci);
        assert!(!state.lock().unwrap().active);
        self.enable_memory();
        Ok(())
    }

    /// What a driver sees fits with what the device knows.
    fn assert_sound(&self) {
        let [status] = self.read(STATUS);
        let state = self.state.lock().unwrap();
        let (driver_ok, needs_reset) = (status & 4 != 0, status & 64 != 0);
        if status == 0 {
            assert!(!state.active && state.draining == 0, "the reset is not over");
        }
        assert!(!state.active || driver_ok, "it runs without DRIVER_OK");
        assert!(
            !driver_ok || state.active || needs_reset || state.draining > 0,
            "it does not run"
        );
        drop(state);
        assert_eq!(self.config::<4>(0), [0xf4, 0x1a, 0x44, 0x10]);
        self.capabilities();
        let range = self.function.bar();
        assert!(range.is_none_or(|range| range.end - range.start == BAR_SIZE && range.start % BAR_SIZE == 0));
    }

    /// The driver of a guest that comes to its senses.
    fn works_afterwards(&self) {
        self.enable_memory();
        self.state.lock().unwrap().fails = false;
        self.mmio.write(BAR + STATUS, &[0]);
        let mut status = [0xff];
        for _ in 0..8 {
            self.mmio.read(BAR + STATUS, &mut status);
        }
        assert_eq!(status, [0], "it cannot be reset");
        self.bring_up(&mut Unstructured::new(&[0xff; 64])).unwrap();
        self.mmio.read(BAR + STATUS, &mut status);
        assert_eq!(status, [0xf]);
        assert_eq!(self.state.lock().unwrap().queues.len(), 3);
    }
}
