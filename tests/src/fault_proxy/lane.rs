//! One way through a proxy.

use std::io;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{ReadHalf, WriteHalf};
use tokio::sync::{mpsc, watch};
use tokio::time::{Instant, sleep_until, timeout};

use super::messages::Messages;

/// Bytes that pass at a time.
const CHUNK: usize = 16 << 10;

/// Chunks that are read and wait to pass, of each connection: what a delay can hold back.
const AHEAD: usize = 64;

/// How much a slow lane may catch up on.
const BURST: Duration = Duration::from_millis(10);

#[derive(Clone, Copy, Debug)]
struct Faults {
    held: bool,
    delay: Duration,
    bytes_per_s: Option<u64>,
}

/// Where bytes are flipped, counted as [`Lane::passed`] counts.
#[derive(Clone, Copy, Debug)]
struct Corruption {
    next: u64,
    every: Option<u64>,
}

/// One way, over all connections of the proxy; its faults can be changed at any time.
#[derive(Debug)]
pub struct Lane {
    faults: watch::Sender<Faults>,
    passed: watch::Sender<u64>,
    corruption: Mutex<Option<Corruption>>,
    /// When the last byte is through, at the lane's rate.
    paced_to: Mutex<Instant>,
}

impl Default for Lane {
    fn default() -> Self {
        Self {
            faults: watch::Sender::new(Faults {
                held: false,
                delay: Duration::ZERO,
                bytes_per_s: None,
            }),
            passed: watch::Sender::new(0),
            corruption: Mutex::default(),
            paced_to: Mutex::new(Instant::now()),
        }
    }
}

impl Lane {
    /// Nothing passes from now on.
    pub fn hold(&self) {
        self.faults.send_modify(|faults| faults.held = true);
    }

    /// Every byte takes this much longer.
    pub fn delay(&self, delay: Duration) {
        self.faults.send_modify(|faults| faults.delay = delay);
    }

    /// At most this much passes, over all connections.
    pub fn limit(&self, bytes_per_s: u64) {
        self.faults.send_modify(|faults| faults.bytes_per_s = Some(bytes_per_s));
    }

    /// Flips one bit, once `after` more bytes have passed.
    pub fn corrupt_at(&self, after: u64) {
        self.corrupt(after, None);
    }

    /// Flips one bit in every `bytes`-th byte.
    pub fn corrupt_every(&self, bytes: u64) {
        self.corrupt(bytes, Some(bytes));
    }

    fn corrupt(&self, after: u64, every: Option<u64>) {
        let next = self.passed() + after;
        *self.corruption.lock().unwrap_or_else(PoisonError::into_inner) = Some(Corruption { next, every });
    }

    /// Everything passes again, in time, at full speed and unharmed; what was held back first.
    pub fn heal(&self) {
        *self.corruption.lock().unwrap_or_else(PoisonError::into_inner) = None;
        self.faults.send_modify(|faults| {
            *faults = Faults {
                held: false,
                delay: Duration::ZERO,
                bytes_per_s: None,
            };
        });
    }

    /// Bytes that have passed since the proxy started.
    pub fn passed(&self) -> u64 {
        *self.passed.borrow()
    }

    /// Waits until `bytes` have passed since the proxy started. Panics at the limit.
    pub async fn wait_passed(&self, bytes: u64, limit: Duration) {
        let mut passed = self.passed.subscribe();
        let waited = timeout(limit, passed.wait_for(|passed| *passed >= bytes)).await;
        assert!(waited.is_ok(), "{} of {bytes} bytes have passed", self.passed());
    }

    /// Carries one connection's bytes until they end, which it passes on; an error when either end broke.
    pub(super) async fn carry(
        &self,
        mut from: ReadHalf<'_>,
        mut to: WriteHalf<'_>,
        mut messages: Option<Messages<'_>>,
    ) -> io::Result<()> {
        let (ahead, mut waiting) = mpsc::channel(AHEAD);
        let read = async move {
            let mut chunk = vec![0; CHUNK];
            loop {
                let count = from.read(&mut chunk).await?;
                if count == 0 {
                    return Ok(());
                }
                let bytes = match &mut messages {
                    None => chunk[..count].to_vec(),
                    Some(messages) => messages.take(&chunk[..count]),
                };
                if ahead.send((Instant::now(), bytes)).await.is_err() {
                    return Ok(());
                }
            }
        };
        let write = async move {
            while let Some((read_at, mut bytes)) = waiting.recv().await {
                for chunk in bytes.chunks_mut(CHUNK) {
                    self.ready(read_at, chunk.len()).await;
                    self.pass(chunk);
                    to.write_all(chunk).await?;
                }
            }
            to.shutdown().await
        };
        tokio::try_join!(read, write).map(|_| ())
    }

    /// Waits until bytes that were read at `read_at` may pass.
    async fn ready(&self, read_at: Instant, bytes: usize) {
        let mut faults = self.faults.subscribe();
        loop {
            let now = *faults.borrow_and_update();
            let by = match now.bytes_per_s {
                None => Instant::now(),
                Some(rate) => self.paced(bytes, rate),
            };
            let passes = async {
                if now.held {
                    std::future::pending::<()>().await;
                }
                sleep_until(by.max(read_at + now.delay)).await;
            };
            tokio::select! {
                // Faults that change count at once, for what waits too.
                _ = faults.changed() => {}
                () = passes => return,
            }
        }
    }

    fn paced(&self, bytes: usize, rate: u64) -> Instant {
        let mut paced_to = self.paced_to.lock().unwrap_or_else(PoisonError::into_inner);
        let start = (*paced_to).max(Instant::now() - BURST);
        *paced_to = start + Duration::from_secs_f64(bytes as f64 / rate as f64);
        *paced_to
    }

    /// Counts bytes that pass now, and flips those that are to be flipped.
    fn pass(&self, chunk: &mut [u8]) {
        let mut passed = 0;
        self.passed.send_modify(|count| {
            passed = *count;
            *count += chunk.len() as u64;
        });
        let mut corruption = self.corruption.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(Corruption { next, every }) = *corruption {
            let Some(byte) = next.checked_sub(passed).and_then(|at| chunk.get_mut(at as usize)) else {
                return;
            };
            *byte ^= 1 << (next % 8);
            *corruption = every.map(|bytes| Corruption {
                next: next + bytes,
                every,
            });
        }
    }
}
