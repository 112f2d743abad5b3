//! This project's own client, on both engines.

use block_io::{
    AlignedBuffer, BlockDevice, Durability, EngineKind, NbdAddress, NbdDevice, NbdOptions, Worker,
    WorkerOptions, ZeroMode,
};

use crate::{Served, file, pattern};

#[test]
fn our_client_and_our_server_understand_each_other() {
    for engine in [EngineKind::Uring, EngineKind::Threads] {
        let served = Served::start_on(
            Some(engine),
            |_| {},
            |folder| vec![file(&folder.join("image"), "disk", 8 << 20, false)],
        );
        let address: NbdAddress = served.uri("disk").parse().unwrap();
        let device = NbdDevice::open(&address, &NbdOptions::default()).unwrap();
        let worker = Worker::start("client", WorkerOptions::default()).unwrap();
        worker.run(move || async move {
            assert_eq!(device.size(), 8 << 20);
            let bytes = pattern(3 << 20, 5);
            let mut buffer = AlignedBuffer::new(bytes.len());
            buffer.as_mut_slice().copy_from_slice(&bytes);
            // SAFETY: the buffer lives until the requests have ended.
            let pieces = [unsafe { buffer.io(0, usize::MAX) }];
            device.write(1 << 20, &pieces, Durability::Durable).await.unwrap();
            device
                .write_zeroes(2 << 20, 1 << 20, ZeroMode::MayUnmap)
                .await
                .unwrap();
            device.flush().await.unwrap();
            device.read(1 << 20, &pieces).await.unwrap();
            let mut expected = bytes;
            expected[1 << 20..2 << 20].fill(0);
            assert!(buffer.as_slice() == expected, "what is read differs");
        });
    }
}
