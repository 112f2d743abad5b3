//! What tasks see of the journal.

use crate::journal::error::JournalError;
use block_io::sim::{Fault, FaultRule};

use super::*;
use crate::journal::ring::PAYLOAD;
use crate::meta_io::demand;

#[test]
fn what_is_committed_is_replayed_group_by_group() {
    on_disk(16, async |sim| {
        let journal = journal(&sim, 16, BEGIN, 1);
        let flushes = start(&journal);
        let long = vec![7; PAYLOAD * 2 + 5];
        assert_eq!(journal.append(b"one").unwrap(), 1);
        assert_eq!(journal.append(b"two").unwrap(), 1);
        journal.commit(1).await.unwrap();
        assert_eq!((journal.durable_group(), journal.open_group()), (1, 2));
        assert_eq!(journal.append(&long).unwrap(), 2);
        journal.commit(2).await.unwrap();
        assert_eq!((flushes.calls.get(), journal.used_blocks()), (2, 4));
        let (groups, end) = read(&sim, &ring(16), BEGIN, 1).await.unwrap();
        assert_eq!(groups, [b"onetwo".to_vec(), long]);
        assert_eq!(end, journal.close_group());
        assert_eq!((end.group, end.block), (3, 4));
    });
}

#[test]
fn nothing_appended_is_durable_at_once() {
    on_disk(8, async |sim| {
        let journal = journal(&sim, 8, BEGIN, 1);
        journal.commit(1).await.unwrap();
        journal.commit(99).await.unwrap();
        assert_eq!(journal.close_group(), BEGIN);
        let (groups, end) = read(&sim, &ring(8), BEGIN, 1).await.unwrap();
        assert!(groups.is_empty() && end == BEGIN);
    });
}

#[test]
fn many_who_wait_share_one_write() {
    on_disk(64, async |sim| {
        let journal = journal(&sim, 64, BEGIN, 1);
        let flushes = start(&journal);
        let waiters = (0..50_u8).map(|number| {
            let journal = Rc::clone(&journal);
            async move {
                let group = journal.append(&[number]).unwrap();
                journal.commit(group).await.unwrap();
                assert!(journal.durable_group() >= group);
            }
        });
        crate::meta_io::join_all(waiters).await;
        assert!(flushes.calls.get() <= 2, "{} writes", flushes.calls.get());
        let (groups, _) = read(&sim, &ring(64), BEGIN, 1).await.unwrap();
        assert_eq!(groups.concat(), (0..50).collect::<Vec<u8>>());
    });
}

#[test]
fn waiting_for_a_group_may_be_given_up() {
    on_disk(16, async |sim| {
        let journal = journal(&sim, 16, BEGIN, 1);
        journal.append(b"given up").unwrap();
        {
            let mut commit = std::pin::pin!(journal.commit(1));
            let polled =
                std::future::poll_fn(|context| std::task::Poll::Ready(commit.as_mut().poll(context))).await;
            assert!(polled.is_pending());
        }
        start(&journal);
        journal.append(b"not").unwrap();
        journal.commit(journal.open_group()).await.unwrap();
        let (groups, _) = read(&sim, &ring(16), BEGIN, 1).await.unwrap();
        assert_eq!(groups.concat(), b"given upnot");
    });
}

#[test]
fn the_writer_may_be_dropped_and_run_again() {
    on_disk(16, async |sim| {
        let journal = journal(&sim, 16, BEGIN, 1);
        journal.append(b"once").unwrap();
        journal.close_group();
        for polls in 0..3 {
            let flushes = Flushes::default();
            let mut run = std::pin::pin!(journal.run(&flushes));
            for _ in 0..polls {
                let _ =
                    std::future::poll_fn(|context| std::task::Poll::Ready(run.as_mut().poll(context))).await;
            }
        }
        start(&journal);
        journal.commit(1).await.unwrap();
        let (groups, _) = read(&sim, &ring(16), BEGIN, 1).await.unwrap();
        assert_eq!(groups, [b"once"]);
    });
}

#[test]
fn a_failed_write_ends_the_journal_for_everybody() {
    on_disk(16, async |sim| {
        let journal = journal(&sim, 16, BEGIN, 1);
        let flushes = start(&journal);
        journal.append(b"good").unwrap();
        journal.commit(1).await.unwrap();
        let held = journal.reserve(1).unwrap();
        sim.inject(0, FaultRule::once(Fault::Error, Operation::Write));
        let group = journal.append(b"bad").unwrap();
        let is_write = |error| matches!(error, JournalError::Write { group: 2, .. });
        assert!(is_write(journal.commit(group).await.unwrap_err()));
        assert!(is_write(journal.append(b"late").unwrap_err()));
        assert!(is_write(journal.commit(group).await.unwrap_err()));
        assert!(is_write(journal.admit(1).await.unwrap_err()));
        assert!(is_write(journal.pressure(1).await.unwrap_err()));
        assert!(is_write(journal.failure().unwrap()));
        assert!(journal.reserve(1).is_none());
        drop(held);
        journal.commit(1).await.unwrap();
        assert_eq!((flushes.calls.get(), journal.durable_group()), (2, 1));
    });
    demand(&["journal: it has failed"]);
}

#[test]
fn a_failed_flush_of_the_data_ends_the_journal_before_the_group_is_written() {
    on_disk(16, async |sim| {
        let journal = journal(&sim, 16, BEGIN, 1);
        start(&journal).fails.set(true);
        journal.append(b"without data").unwrap();
        let error = journal.commit(1).await.unwrap_err();
        assert!(matches!(error, JournalError::Prepare { group: 1, .. }), "{error}");
        let (groups, _) = read(&sim, &ring(16), BEGIN, 1).await.unwrap();
        assert!(groups.is_empty());
    });
}

#[test]
fn stopping_writes_what_is_waited_for_and_takes_no_more() {
    on_disk(16, async |sim| {
        let journal = journal(&sim, 16, BEGIN, 1);
        journal.append(b"last").unwrap();
        journal.close_group();
        journal.stop();
        journal.run(&Flushes::default()).await.unwrap();
        assert_eq!(journal.durable_group(), 1);
        assert!(matches!(journal.append(b"x"), Err(JournalError::Stopped)));
    });
}

#[test]
fn room_is_promised_and_given_back() {
    on_disk(8, async |sim| {
        let journal = journal(&sim, 8, BEGIN, 1);
        start(&journal);
        // Each holds one block more than it needs, and the last block is nobody's: a checkpoint needs no ticket.
        let tickets: Vec<Ticket> = (0..3).map(|_| journal.reserve(10).unwrap()).collect();
        assert!(journal.reserve(10).is_none());
        drop(tickets);
        assert!(journal.reserve(PAYLOAD * 6).is_some());
        assert!(journal.reserve(PAYLOAD * 6 + 1).is_none());
        let error = journal.admit(PAYLOAD * 7).await.unwrap_err();
        assert!(matches!(error, JournalError::TooLarge { .. }), "{error}");
        assert!(matches!(
            journal.append(&vec![0; PAYLOAD * 8 + 1]),
            Err(JournalError::TooLarge { .. })
        ));
        journal.append(&vec![0; PAYLOAD * 8]).unwrap();
        assert!(matches!(
            journal.append(b"x"),
            Err(JournalError::Full { bytes: 1 })
        ));
        assert_eq!((journal.used_blocks(), journal.capacity()), (8, 8));
    });
    demand(&["journal: the ring is full"]);
}

#[test]
fn who_waits_for_room_gets_it_from_a_checkpoint_in_order() {
    on_disk(8, async |sim| {
        let journal = journal(&sim, 8, BEGIN, 1);
        start(&journal);
        journal.append(&vec![1; PAYLOAD * 6]).unwrap();
        let order = Rc::new(std::cell::RefCell::new(Vec::new()));
        for (number, bytes) in [(0, PAYLOAD * 5), (1, 1), (2, PAYLOAD * 6)] {
            let (journal, order) = (Rc::clone(&journal), Rc::clone(&order));
            let spawned = block_io::spawn_local(async move {
                let ticket = journal.admit(bytes).await.unwrap();
                order.borrow_mut().push(number);
                let group = journal.append(&vec![2; bytes]).unwrap();
                drop(ticket);
                journal.commit(group).await.unwrap();
            });
            assert!(spawned.is_ok());
        }
        sim_pause(&sim).await;
        // Somebody gives up.
        {
            let mut gone = std::pin::pin!(journal.admit(PAYLOAD));
            let polled =
                std::future::poll_fn(|context| std::task::Poll::Ready(gone.as_mut().poll(context))).await;
            assert!(polled.is_pending());
        }
        let mut checkpoints = 0;
        while order.borrow().len() < 3 {
            journal.pressure(8).await.unwrap();
            let position = journal.close_group();
            journal.commit(position.group - 1).await.unwrap();
            journal.release(&position);
            checkpoints += 1;
            sim_pause(&sim).await;
        }
        assert_eq!(*order.borrow(), [0, 1, 2]);
        assert!(checkpoints <= 3);
    });
    demand(&["journal: somebody waits for room"]);
}

/// Lets the others run.
async fn sim_pause(sim: &Sim) {
    use block_io::Clock;
    sim.clock().sleep(std::time::Duration::from_secs(1)).await;
}

#[test]
fn the_ring_goes_round_and_old_laps_do_not_count() {
    on_disk(7, async |sim| {
        let journal = journal(&sim, 7, BEGIN, 1);
        start(&journal);
        let mut from = BEGIN;
        let mut content = Vec::new();
        for number in 0..100_u8 {
            let ticket = journal.admit(PAYLOAD * 2).await.unwrap();
            let bytes = vec![number; 1 + usize::from(number) * 137 % (PAYLOAD * 2)];
            let group = journal.append(&bytes).unwrap();
            drop(ticket);
            content.push(bytes);
            journal.commit(group).await.unwrap();
            let (groups, end) = read(&sim, &ring(7), from, 1).await.unwrap();
            assert_eq!(groups, content);
            assert_eq!(end, journal.close_group());
            if journal.used_blocks() > 3 {
                from = journal.close_group();
                content.clear();
                journal.release(&from);
            }
        }
    });
    demand(&["journal: a group goes across the ring's end"]);
}

#[test]
fn a_group_grows_no_larger_than_its_count_can_say() {
    on_disk(20_000, async |sim| {
        let journal = journal(&sim, 20_000, BEGIN, 1);
        start(&journal);
        let large = vec![5; PAYLOAD * 10_000];
        assert_eq!(journal.append(&large).unwrap(), 1);
        assert_eq!(journal.append(&vec![6; PAYLOAD * 9_000]).unwrap(), 2);
        journal.commit(2).await.unwrap();
        let (groups, end) = read(&sim, &ring(20_000), BEGIN, 1).await.unwrap();
        assert_eq!(
            (groups.len(), groups[0].len(), end.block),
            (2, large.len(), 19_000)
        );
    });
    demand(&["journal: a group is as large as can be"]);
}

#[test]
fn a_checkpoint_cuts_between_what_was_and_what_comes() {
    on_disk(16, async |sim| {
        let journal = journal(&sim, 16, BEGIN, 1);
        start(&journal);
        journal.append(b"before").unwrap();
        let position = journal.close_group();
        assert_eq!(journal.close_group(), position);
        assert_eq!(journal.append(b"after").unwrap(), position.group);
        journal.commit(position.group).await.unwrap();
        let (groups, _) = read(&sim, &ring(16), position, 1).await.unwrap();
        assert_eq!(groups, [b"after"]);
    });
}

#[test]
fn an_error_of_the_reader_and_of_the_disk_ends_replay() {
    on_disk(16, async |sim| {
        let journal = journal(&sim, 16, BEGIN, 1);
        start(&journal);
        for _ in 0..3 {
            let group = journal.append(b"x").unwrap();
            journal.commit(group).await.unwrap();
        }
        let mut count = 0;
        let (disk, ring) = (sim.disk(0), ring(16));
        let failed = replay(&disk, &ring, BEGIN, 1, async |_: &[u8]| {
            count += 1;
            if count == 2 { Err(std::fmt::Error) } else { Ok(()) }
        });
        let error = failed.await.unwrap_err();
        assert!(matches!(error, ReplayError::Apply { group: 2, .. }), "{error}");
        sim.inject(0, FaultRule::once(Fault::Error, Operation::Read));
        let error = read(&sim, &ring, BEGIN, 1).await.unwrap_err();
        assert!(matches!(error, ReplayError::Device(_)), "{error}");
    });
}
