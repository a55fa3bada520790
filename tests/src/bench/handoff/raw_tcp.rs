//! Plain sockets: what TCP alone carries between two processes, 1 MiB a write, nothing checked.

use std::{
    io::{Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    time::Instant,
};

use super::{Role, end, end::End, runs::Run};

const WRITE_BYTES: usize = 1 << 20;

/// Both ends.
pub struct RawTcp {
    sink: End,
    source: End,
    streams: usize,
}

impl RawTcp {
    /// Starts them.
    pub fn start(streams: usize) -> anyhow::Result<Self> {
        let program = std::env::current_exe()?;
        let (sink, address): (_, SocketAddr) = End::start(&program, &Role::TcpSink)?;
        let (mut source, ()) = End::start(&program, &Role::TcpSource(streams))?;
        let () = source.ask(&Asked::Connect(address))?;
        Ok(Self { sink, source, streams })
    }

    /// Sends `bytes` from memory of that size into memory of that size.
    pub fn run(&mut self, bytes: usize) -> anyhow::Result<Run> {
        let share = bytes / self.streams;
        let before: f64 = self.sink.ask(&(self.streams, share))?;
        let (seconds, source_s): (f64, f64) = self.source.ask(&Asked::Send(share))?;
        let after: f64 = self.sink.ask(&(0_usize, 0_usize))?;
        Ok(Run {
            bytes: (share * self.streams) as f64,
            seconds,
            cpu_s: Some(after - before + source_s),
        })
    }
}

#[derive(serde::Serialize, serde::Deserialize)]
enum Asked {
    Connect(SocketAddr),
    /// So many bytes through each stream.
    Send(usize),
}

/// Answers (streams, bytes) with its CPU seconds so far, and then takes so many bytes from each stream; each gets a byte back at the end.
pub(super) fn sink() -> anyhow::Result<()> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let mut streams: Vec<(TcpStream, Vec<u8>)> = Vec::new();
    end::answer(&Ok(listener.local_addr()?))?;
    while let Some((count, bytes)) = end::read::<(usize, usize)>()? {
        while streams.len() < count {
            streams.push((listener.accept()?.0, Vec::new()));
        }
        for (_, memory) in &mut streams {
            if memory.len() < bytes {
                memory.resize(bytes, 1);
            }
        }
        end::answer(&Ok(end::cpu_s()))?;
        on_each(&mut streams, |(stream, memory)| {
            for part in memory[..bytes].chunks_mut(WRITE_BYTES) {
                stream.read_exact(part)?;
            }
            if bytes > 0 { stream.write_all(&[1]) } else { Ok(()) }
        })?;
    }
    Ok(())
}

/// Answers with seconds, and its CPU seconds.
pub(super) fn source(count: usize) -> anyhow::Result<()> {
    let mut streams: Vec<(TcpStream, Vec<u8>)> = Vec::new();
    end::answer(&Ok(()))?;
    while let Some(asked) = end::read()? {
        match asked {
            Asked::Connect(address) => {
                for _ in 0..count {
                    let stream = TcpStream::connect(address)?;
                    stream.set_nodelay(true)?;
                    streams.push((stream, Vec::new()));
                }
                end::answer(&Ok(()))?;
            }
            Asked::Send(bytes) => {
                for (_, memory) in &mut streams {
                    if memory.len() < bytes {
                        memory.resize(bytes, 1);
                    }
                }
                let (cpu_s, started) = (end::cpu_s(), Instant::now());
                on_each(&mut streams, |(stream, memory)| {
                    for part in memory[..bytes].chunks(WRITE_BYTES) {
                        stream.write_all(part)?;
                    }
                    stream.read_exact(&mut [0])
                })?;
                end::answer(&Ok((started.elapsed().as_secs_f64(), end::cpu_s() - cpu_s)))?;
            }
        }
    }
    Ok(())
}

/// The first on this thread.
fn on_each<T: Send>(streams: &mut [T], act: impl Fn(&mut T) -> std::io::Result<()> + Sync) -> std::io::Result<()> {
    let Some((first, others)) = streams.split_first_mut() else {
        return Ok(());
    };
    std::thread::scope(|scope| {
        let act = &act;
        let others: Vec<_> = others.iter_mut().map(|other| scope.spawn(move || act(other))).collect();
        act(first)?;
        others
            .into_iter()
            .try_for_each(|other| other.join().expect("it does not panic"))
    })
}
