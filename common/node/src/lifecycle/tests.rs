use std::sync::{Arc, Mutex};

use tokio::{sync::oneshot, time::Instant};

use super::*;

const LONG: Duration = Duration::from_secs(60);

#[tokio::test]
async fn phases_only_move_forward() {
    let life = Lifecycle::new();
    let mut seen = life.watch();
    assert_eq!(life.phase(), Phase::Starting);
    assert!(life.set(Phase::Ready));
    assert!(seen.has_changed().expect("alive"));
    assert_eq!(*seen.borrow_and_update(), Phase::Ready);
    assert!(life.set(Phase::Draining));
    assert!(
        !life.set(Phase::Ready),
        "a draining process does not become ready again"
    );
    assert!(!life.set(Phase::Draining));
    assert_eq!(life.phase(), Phase::Draining);
    assert!(!life.shutdown_token().is_cancelled());
    assert!(life.set(Phase::Stopped));
    assert!(life.shutdown_token().is_cancelled());
    // Both have been reached.
    life.draining().await;
    life.stopped().await;
}

#[tokio::test]
async fn a_drain_may_have_no_bound() {
    let life = Lifecycle::new();
    assert_eq!(life.drain(Duration::from_secs(u64::MAX)).await, Drained::Clean);
}

#[tokio::test]
async fn a_drain_ends_requests_first_then_tasks() {
    let life = Lifecycle::new();
    life.set(Phase::Ready);
    let order = Arc::new(Mutex::new(Vec::new()));
    let note = |what: &'static str| {
        let order = order.clone();
        move || order.lock().expect("not poisoned").push(what)
    };

    let (finish, finished) = oneshot::channel::<()>();
    let request = note("request");
    life.requests().spawn(async move {
        finished.await.expect("told to finish");
        request();
    });
    let (stop, task) = (life.shutdown_token(), note("task"));
    life.spawn(async move {
        stop.cancelled().await;
        task();
    });

    let drain = TaskTracker::new().spawn({
        let life = life.clone();
        async move { life.drain(LONG).await }
    });
    life.draining().await;
    assert!(
        !life.shutdown_token().is_cancelled(),
        "tasks serve while a request runs"
    );
    finish.send(()).expect("the request waits");
    assert_eq!(drain.await.expect("no panic"), Drained::Clean);
    assert_eq!(*order.lock().expect("not poisoned"), ["request", "task"]);
    assert_eq!(life.phase(), Phase::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_request_beyond_the_bound_is_cut_off_and_reported() {
    let life = Lifecycle::new();
    let stop = life.shutdown_token();
    life.requests().spawn(async move { stop.cancelled().await });
    let held = life.requests().token();
    let began = Instant::now();
    assert_eq!(
        life.drain(Duration::from_secs(5)).await,
        Drained::Cut { requests: 2, tasks: 1 }
    );
    assert_eq!(began.elapsed(), Duration::from_secs(5) + limits::STOP_TIMEOUT);
    drop(held);
    assert_eq!(life.phase(), Phase::Stopped);
}

#[tokio::test(start_paused = true)]
async fn a_task_that_does_not_end_is_reported_and_holds_nobody_up() {
    let life = Lifecycle::new();
    life.spawn(std::future::pending::<()>());
    assert_eq!(life.drain(LONG).await, Drained::Cut { requests: 0, tasks: 1 });
}
