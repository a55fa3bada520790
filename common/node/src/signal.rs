//! What tells a process to stop.

use std::{io, io::Read, process};

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::{Lifecycle, Phase};

/// Exit status when a second signal cuts the drain short.
const FORCED_EXIT: i32 = 1;

/// From now on the first SIGINT or SIGTERM moves `lifecycle` to [`Phase::Draining`], and a second one exits at once.
///
/// Whoever runs the process then calls [`Lifecycle::drain`]. Errors: the signals cannot be listened to.
pub fn drain_on_signals(lifecycle: &Lifecycle) -> io::Result<()> {
    let interrupt = signal(SignalKind::interrupt())?;
    let terminate = signal(SignalKind::terminate())?;
    let stop = lifecycle.shutdown_token();
    let life = lifecycle.clone();
    lifecycle.spawn(async move {
        tokio::select! {
            () = stop.cancelled() => {}
            () = watch(life, interrupt, terminate) => {}
        }
    });
    Ok(())
}

async fn watch(lifecycle: Lifecycle, mut interrupt: Signal, mut terminate: Signal) {
    next(&mut interrupt, &mut terminate).await;
    tracing::info!("told to stop: draining; a second signal stops at once");
    lifecycle.set(Phase::Draining);
    next(&mut interrupt, &mut terminate).await;
    tracing::warn!("second signal: stopping at once");
    process::exit(FORCED_EXIT);
}

async fn next(interrupt: &mut Signal, terminate: &mut Signal) {
    tokio::select! {
        _ = interrupt.recv() => {}
        _ = terminate.recv() => {}
    }
}

/// Drains when stdin closes: a parent that holds the other end of the pipe can then die in any way, even by SIGKILL, and leaves no orphan.
///
/// Reads on a thread of its own that nobody waits for, since a read of stdin cannot be cancelled. Errors: no thread could be started.
pub fn drain_when_stdin_closes(lifecycle: &Lifecycle) -> io::Result<()> {
    let life = lifecycle.clone();
    std::thread::Builder::new().name("stdin".into()).spawn(move || {
        let mut sink = [0_u8; 256];
        let mut stdin = io::stdin().lock();
        loop {
            match stdin.read(&mut sink) {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(_) => break,
            }
        }
        tracing::info!("stdin has closed: draining");
        life.set(Phase::Draining);
    })?;
    Ok(())
}
