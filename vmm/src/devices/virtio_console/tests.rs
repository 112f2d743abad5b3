//! The console between a test driver and pipes.

use std::io::{self, PipeReader, PipeWriter, Read, Write};

use super::*;
use crate::console::testing::Bench;
use crate::devices::test_driver::{BUFFERS, Driver, HIGH_MEMORY, TestLoop, eventually, readable, writable};

const ALL: u64 = u64::MAX;
const RECEIVE_QUEUE: usize = 0;
const SEND_QUEUE: usize = 1;

/// A device, the loops that serve it and its console, and the ends that type and see.
struct Setup {
    device: VirtioConsole,
    driver: Driver,
    keyboard: PipeWriter,
    screen: PipeReader,
    event_loop: TestLoop,
    bench: Bench,
}

fn setup() -> Setup {
    let (input, keyboard) = io::pipe().unwrap();
    let (screen, output) = io::pipe().unwrap();
    let bench = Bench::on(&input, &output);
    let event_loop = TestLoop::new();
    let mut device = VirtioConsole::new(event_loop.handle(), bench.handle());
    let driver = Driver::new(&mut device, ALL);
    Setup {
        device,
        driver,
        keyboard,
        screen,
        event_loop,
        bench,
    }
}

impl Setup {
    fn send(&mut self, address: u64, text: &[u8]) {
        self.driver.write(address, text);
        self.driver.queues[SEND_QUEUE].add(&[readable(address, text.len())]);
        self.driver.queues[SEND_QUEUE].ring();
    }

    fn expect(&mut self, text: &[u8]) {
        let mut bytes = vec![0; text.len()];
        self.screen.read_exact(&mut bytes).unwrap();
        assert!(bytes == text, "{:?}", String::from_utf8_lossy(&bytes));
    }

    /// Reads `count` bytes of input out of buffers of `length` bytes, which are given one at a time.
    fn receive(&mut self, count: usize, length: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        while bytes.len() < count {
            let queue = &mut self.driver.queues[RECEIVE_QUEUE];
            queue.add(&[writable(BUFFERS, length)]);
            queue.ring();
            let used = queue.used();
            bytes.extend(self.driver.read(BUFFERS, usize::try_from(used.written).unwrap()));
        }
        bytes
    }
}

fn text(length: usize) -> Vec<u8> {
    (0..length)
        .map(|at| b"0123456789abcdef\n"[(at + at / 997) % 17])
        .collect()
}

#[test]
fn output_reaches_the_screen_and_input_the_guest() {
    let mut setup = setup();
    setup.send(BUFFERS, b"login: ");
    setup.expect(b"login: ");
    setup.driver.queues[SEND_QUEUE].used();
    setup.keyboard.write_all(b"root\n").unwrap();
    assert_eq!(setup.receive(5, 64), b"root\n");
    setup.bench.assert_idle();
}

#[test]
fn input_waits_for_the_guests_buffers_and_none_is_lost() {
    let mut setup = setup();
    let typed = text(1 << 20);
    let mut keyboard = setup.keyboard.try_clone().unwrap();
    let expected = typed.clone();
    let typist = std::thread::spawn(move || keyboard.write_all(&typed).unwrap());
    let received = setup.receive(expected.len(), 4096);
    typist.join().unwrap();
    assert!(received == expected);
}

#[test]
fn a_mebibyte_of_output_waits_for_a_slow_screen_and_none_is_lost() {
    let mut setup = setup();
    let all = text(1 << 20);
    for (number, part) in all.chunks(32 << 10).enumerate() {
        let address = HIGH_MEMORY + u64::try_from(number << 15).unwrap();
        setup.driver.write(address, part);
        setup.driver.queues[SEND_QUEUE]
            .add(&[readable(address, 100), readable(address + 100, part.len() - 100)]);
    }
    setup.driver.queues[SEND_QUEUE].ring();
    // The console asks to wait, and the guest's chains stay where they are.
    std::thread::sleep(std::time::Duration::from_millis(100));
    let mut given_back = 0;
    while setup.driver.queues[SEND_QUEUE].try_used().is_some() {
        given_back += 1;
    }
    assert!(given_back < 32, "the console took a mebibyte that nobody read");
    setup.expect(&all);
    for _ in given_back..32 {
        setup.driver.queues[SEND_QUEUE].used();
    }
}

#[test]
fn a_screen_that_nobody_reads_does_not_stop_the_guest_for_ever() {
    let mut setup = setup();
    for _ in 0..32 {
        setup.driver.queues[SEND_QUEUE].add(&[readable(BUFFERS, 64 << 10)]);
    }
    setup.driver.queues[SEND_QUEUE].ring();
    for _ in 0..32 {
        setup.driver.queues[SEND_QUEUE].used();
    }
}

#[test]
fn a_reboot_keeps_what_was_typed_in_between() {
    let mut setup = setup();
    Driver::reset(&mut setup.device);
    setup.keyboard.write_all(b"early").unwrap();
    std::thread::sleep(std::time::Duration::from_millis(20));
    setup.driver.activate(&mut setup.device, ALL);
    assert_eq!(setup.receive(5, 64), b"early");
    setup.send(BUFFERS, b"again\n");
    setup.expect(b"again\n");
}

#[test]
fn resets_under_load_leave_guest_memory_alone() {
    let mut setup = setup();
    let mut keyboard = setup.keyboard.try_clone().unwrap();
    let mut screen = setup.screen.try_clone().unwrap();
    let (stop, stopped) = io::pipe().unwrap();
    let typist = std::thread::spawn(move || {
        for _ in 0..200 {
            if keyboard.write_all(&[b'x'; 512]).is_err() {
                break;
            }
        }
        drop(stop);
    });
    let reader = std::thread::spawn(move || {
        let mut buffer = [0; 4096];
        while screen.read(&mut buffer).is_ok_and(|count| count > 0) {}
    });
    for _ in 0..100 {
        for number in 0..20 {
            setup.driver.queues[RECEIVE_QUEUE].add(&[writable(BUFFERS + number * 64, 64)]);
            setup.driver.queues[SEND_QUEUE].add(&[readable(HIGH_MEMORY, 3000)]);
        }
        setup.driver.queues[RECEIVE_QUEUE].ring();
        setup.driver.queues[SEND_QUEUE].ring();
        setup.device.reset();
        assert!(setup.device.is_idle());
        let before = setup.driver.read(BUFFERS, 20 * 64);
        std::thread::yield_now();
        assert_eq!(setup.driver.read(BUFFERS, 20 * 64), before);
        assert_eq!(setup.driver.events.reset_reason(), None);
        setup.driver.activate(&mut setup.device, ALL);
    }
    // Take the rest of what is typed, so that the typist ends.
    while !typist.is_finished() {
        let queue = &mut setup.driver.queues[RECEIVE_QUEUE];
        while queue.try_used().is_some() {}
        queue.add(&[writable(BUFFERS, 4096)]);
        queue.ring();
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
    typist.join().unwrap();
    drop(stopped);
    let Setup {
        device,
        bench,
        event_loop,
        ..
    } = setup;
    drop(device);
    drop((event_loop, bench));
    reader.join().unwrap();
}

#[test]
fn a_hostile_driver_stops_it_until_the_reset() {
    for queue in [RECEIVE_QUEUE, SEND_QUEUE] {
        let mut setup = setup();
        setup.driver.queues[queue].set_avail_index(1000);
        setup.keyboard.write_all(b"x").unwrap();
        setup.driver.queues[queue].ring();
        let reason = setup.driver.reset_reason();
        assert!(reason.contains(&format!("virtqueue {queue}")), "{reason}");
        Driver::reset(&mut setup.device);
        setup.driver.activate(&mut setup.device, ALL);
        setup.send(BUFFERS, b"works\n");
        setup.expect(b"works\n");
        assert_eq!(setup.receive(1, 64), b"x");
    }
}

#[test]
fn buffers_of_no_use_are_given_back() {
    let mut setup = setup();
    setup.driver.queues[RECEIVE_QUEUE].add(&[readable(BUFFERS, 10)]);
    setup.driver.queues[RECEIVE_QUEUE].add(&[writable(BUFFERS, 0)]);
    setup.driver.queues[RECEIVE_QUEUE].add(&[writable(BUFFERS, 10)]);
    setup.driver.queues[RECEIVE_QUEUE].ring();
    setup.keyboard.write_all(b"y").unwrap();
    assert_eq!(setup.driver.queues[RECEIVE_QUEUE].used().written, 0);
    assert_eq!(setup.driver.queues[RECEIVE_QUEUE].used().written, 0);
    assert_eq!(setup.driver.queues[RECEIVE_QUEUE].used().written, 1);
    setup.driver.queues[SEND_QUEUE].add(&[writable(BUFFERS, 10)]);
    setup.driver.queues[SEND_QUEUE].ring();
    setup.driver.queues[SEND_QUEUE].used();
}

#[test]
fn the_guest_learns_of_the_screens_size_and_its_changes() {
    let event_loop = TestLoop::new();
    let size = Arc::new(ScreenSize::new(80, 25));
    let mut device = VirtioConsole::new(event_loop.handle(), ConsoleHandle::null());
    assert_eq!(device.features() & FEATURE_SIZE, 0);
    device = device.with_size(Arc::clone(&size));
    assert_ne!(device.features() & FEATURE_SIZE, 0);
    let driver = Driver::new(&mut device, ALL);
    let read = |device: &VirtioConsole| {
        let mut bytes = [0xff; 14];
        device.read_config(0, &mut bytes);
        bytes
    };
    assert_eq!(read(&device), [80, 0, 25, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
    let changes = || {
        driver
            .events
            .config_changes
            .load(std::sync::atomic::Ordering::SeqCst)
    };
    size.set(80, 25);
    assert_eq!(changes(), 0);
    size.set(300, 100);
    assert_eq!(changes(), 1);
    assert_eq!(read(&device)[..4], [44, 1, 100, 0]);
    Driver::reset(&mut device);
    size.set(1, 1);
    assert_eq!(changes(), 1);
}

#[test]
fn emergency_output_needs_no_driver() {
    let (typed, _keyboard) = io::pipe().unwrap();
    let (mut screen, output) = io::pipe().unwrap();
    let bench = Bench::on(&typed, &output);
    let event_loop = TestLoop::new();
    let mut device = VirtioConsole::new(event_loop.handle(), bench.handle());
    for byte in b"oops\n" {
        device.write_config(8, &u32::from(*byte).to_le_bytes());
    }
    device.write_config(0, &[1; 8]);
    device.write_config(u64::MAX, &[1; 8]);
    device.write_config(8, &[]);
    let mut bytes = [0; 5];
    screen.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"oops\n");
    eventually("an idle device", || device.is_idle());
}

proptest::proptest! {
    #[test]
    fn no_input_breaks_it(data in proptest::collection::vec(proptest::arbitrary::any::<u8>(), 0..2048)) {
        fuzz_console(&data);
    }

    #[test]
    fn no_mostly_valid_chains_break_it(data in crate::devices::fuzz::tests::mostly_valid(2)) {
        fuzz_console(&data);
    }
}
