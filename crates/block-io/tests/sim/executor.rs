//! Scheduling, time, deadlocks, and the parts of the worker's interface that tasks find in a simulation, too.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::rc::Rc;
use std::time::Duration;

use block_io::sim::{DiskOptions, RunOptions, Sim, World};
use block_io::{BlockDevice, Clock, Durability, EventSignal, EventWatch, spawn_local};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

fn world() -> World {
    World::new([DiskOptions::new("disk", 1 << 30)])
}

/// Several tasks that write and read the same places; gives the order in which they end.
async fn busy(sim: Sim) -> Vec<u64> {
    let order = Rc::new(RefCell::new(Vec::new()));
    for task in 0..5_u64 {
        let (disk, order) = (sim.disk(0), Rc::clone(&order));
        sim.spawn("client", async move {
            let fill = u8::try_from(task).unwrap();
            for _ in 0..10 {
                disk.write_bytes(task % 2 * 512, &[fill; 1024], Durability::Volatile)
                    .await
                    .unwrap();
                disk.read_bytes(0, 2048).await.unwrap();
                disk.flush().await.unwrap();
            }
            order.borrow_mut().push(task);
        });
    }
    while order.borrow().len() < 5 {
        sim.clock().sleep(Duration::from_millis(5)).await;
    }
    order.take()
}

#[test]
fn one_seed_is_one_history_and_other_seeds_are_others() {
    let mut hashes = BTreeSet::new();
    let mut orders = BTreeSet::new();
    for seed in 0..20 {
        let first = world().run(&RunOptions::random(seed), busy).unwrap();
        let again = world().run(&RunOptions::random(seed), busy).unwrap();
        assert_eq!(first, again);
        hashes.insert(first.hash);
        orders.insert(first.ended.done());
    }
    assert_eq!(hashes.len(), 20);
    assert!(orders.len() > 10, "{orders:?}");
}

#[test]
fn a_deadlock_names_the_tasks_that_wait() {
    let failure = world()
        .run(&RunOptions::random(0), async |sim| {
            sim.spawn("stuck one", std::future::pending());
            sim.spawn("done one", async {});
            std::future::pending::<()>().await;
        })
        .unwrap_err();
    assert_eq!(
        failure.message,
        "deadlock: nothing is in flight, and these tasks wait: main, stuck one"
    );
    assert!(failure.trace.iter().any(|line| line.ends_with("run done one")));
}

#[test]
fn going_in_circles_and_panics_are_failures_too() {
    let mut options = RunOptions::random(0);
    options.max_events = 1000;
    let circles = world().run(&options, async |sim| {
        loop {
            sim.clock().sleep(Duration::from_secs(3600)).await;
        }
        #[expect(unreachable_code, reason = "says what the block would return")]
        ()
    });
    assert!(circles.unwrap_err().message.contains("no end after 1000 events"));
    let panic = world().run(&options, async |_| panic!("ouch"));
    assert_eq!(panic.unwrap_err().message, "panic: ouch");
}

#[test]
fn time_passes_only_in_the_simulation() {
    let start = std::time::Instant::now();
    let run = world().run(&RunOptions::in_order(), async |sim| {
        sim.clock().sleep(Duration::from_secs(86400 * 365)).await;
        sim.clock().now()
    });
    assert_eq!(run.unwrap().ended.done(), Some(Duration::from_secs(86400 * 365)));
    assert!(start.elapsed() < Duration::from_secs(5));
}

#[test]
fn code_for_workers_finds_spawn_local_and_event_watches() {
    let run = world().run(&RunOptions::random(5), async |sim| {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        let signal = EventSignal::new(event.try_clone().unwrap());
        let mut watch = EventWatch::new(event).unwrap();
        let disk = sim.disk(0);
        let spawned = spawn_local(async move {
            disk.flush().await.unwrap();
            signal.signal().unwrap();
        });
        assert!(spawned.is_ok());
        watch.wait().await.unwrap();
    });
    run.unwrap();
    assert!(spawn_local(async {}).is_err(), "the simulation is over");
}

#[test]
fn a_request_that_is_dropped_ends_first() {
    let mut world = world();
    let run = world.run(&RunOptions::random(9), async |sim| {
        let disk = sim.disk(0);
        let mut write = Box::pin(disk.write_bytes(0, &[5; 512], Durability::Volatile));
        std::future::poll_fn(|context| {
            assert!(write.as_mut().poll(context).is_pending());
            std::task::Poll::Ready(())
        })
        .await;
        drop(write);
        disk.read_bytes(0, 512).await.unwrap()[0]
    });
    assert_eq!(run.unwrap().ended.done(), Some(5));
}
