use std::sync::atomic::{AtomicUsize, Ordering::SeqCst};

use super::*;

#[test]
fn phases_see_each_other_with_more_threads_than_cores() {
    for threads in [1, 2, 3, 8] {
        let mut team = Team::new(threads).unwrap();
        for _ in 0..50 {
            let counts: Vec<AtomicUsize> = (0..40).map(|_| AtomicUsize::new(0)).collect();
            let items: Vec<AtomicUsize> = (0..100).map(|_| AtomicUsize::new(0)).collect();
            team.run(&|member| {
                for (phase, count) in counts.iter().enumerate() {
                    if phase > 0 {
                        assert_eq!(counts[phase - 1].load(SeqCst), member.threads());
                    }
                    count.fetch_add(1, SeqCst);
                    loop {
                        let item = member.next_item();
                        if item >= items.len() {
                            break;
                        }
                        items[item].fetch_add(1, SeqCst);
                    }
                    member.barrier();
                }
            })
            .unwrap();
            assert!(
                items.iter().all(|item| item.load(SeqCst) == counts.len()),
                "each item once per phase"
            );
        }
    }
}

#[test]
fn shares_cover_everything_once() {
    let mut team = Team::new(3).unwrap();
    for total in [0, 1, 2, 3, 10, 100] {
        let items: Vec<AtomicUsize> = (0..total).map(|_| AtomicUsize::new(0)).collect();
        team.run(&|member| {
            for i in member.share(total) {
                items[i].fetch_add(1, SeqCst);
            }
        })
        .unwrap();
        assert!(items.iter().all(|item| item.load(SeqCst) == 1));
    }
}

#[test]
fn a_panic_breaks_the_team_and_hangs_nobody() {
    for who in 0..3 {
        let mut team = Team::new(3).unwrap();
        let result = team.run(&|member| {
            member.barrier();
            assert_ne!(member.index(), who, "on purpose");
            member.barrier();
        });
        assert_eq!(result, Err(Broken));
        assert_eq!(team.run(&|_| {}), Err(Broken));
    }
}

/// The others wait until they have done so for half of the task.
fn run_with_late(team: &mut Team, who: usize) {
    let started = Instant::now();
    team.run(&|member| {
        let wait = || member.shared.barrier.kept_waiting() * 2;
        while member.index() == who && wait() < started.elapsed() {
            hint::spin_loop();
        }
        member.barrier();
    })
    .unwrap();
}

#[test]
fn a_thread_that_keeps_the_others_waiting_stands_aside() {
    for (who, present) in [(0, [0, 1]), (1, [0, 2]), (2, [0, 1])] {
        // (On a busy machine another may be later still.)
        let late = (0..100).find_map(|_| {
            let mut team = Team::new(3).unwrap();
            run_with_late(&mut team, who);
            team.attendance.present().eq(present).then_some(team)
        });
        let mut team = late.unwrap_or_else(|| panic!("{who} was late, and stayed"));
        // Without it or with it again: whoever runs runs once.
        for _ in 0..100 {
            let ran = AtomicUsize::new(0);
            team.run(&|member| {
                ran.fetch_add(1, SeqCst);
                member.barrier();
                assert_eq!(ran.load(SeqCst), member.threads());
            })
            .unwrap();
        }
    }
}

thread_local! {
    /// Of this thread's waits in [`linger`].
    static RANDOM: std::cell::Cell<u32> = const { std::cell::Cell::new(1) };
}

/// Lets other threads come in between, now for longer, now for shorter.
pub(super) fn linger() {
    let random = RANDOM.get().wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    RANDOM.set(random);
    for _ in 0..random >> 28 {
        thread::yield_now();
    }
}

/// Nobody spins or yields, so that at every gate the wake-up of a sleeper may meet one who is about to sleep.
#[test]
fn no_wake_up_is_lost() {
    let (done, finished) = std::sync::mpsc::sync_channel(1);
    thread::spawn(move || {
        for threads in [2, 3, 5] {
            let mut team = Team::with_patience(threads, NONE, NONE).unwrap();
            let [phases, expected] = [0, 0].map(AtomicUsize::new);
            for _ in 0..200 {
                team.run(&|member| {
                    expected.fetch_add(20, SeqCst);
                    for _ in 0..20 {
                        phases.fetch_add(1, SeqCst);
                        member.barrier();
                    }
                })
                .unwrap();
            }
            assert_eq!(phases.load(SeqCst), expected.load(SeqCst));
        }
        done.send(()).unwrap();
    });
    // (Only a hang takes that long.)
    let outcome = finished.recv_timeout(std::time::Duration::from_secs(300));
    assert_eq!(outcome, Ok(()), "a thread sleeps though all are there");
}

#[test]
fn a_panic_reaches_those_who_sleep() {
    for who in 0..3 {
        let mut team = Team::with_patience(3, NONE, NONE).unwrap();
        let result = team.run(&|member| {
            member.barrier();
            assert_ne!(member.index(), who, "on purpose");
            member.barrier();
        });
        assert_eq!(result, Err(Broken));
    }
}
