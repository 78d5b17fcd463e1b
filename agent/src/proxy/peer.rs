//! One connection of the agent to its proxy, and hold of the process at its other end.

use super::wire::{FromAgent, FromProxy, Reader, Writer};
use anyhow::{Context as _, bail};
use nix::sys::signal::Signal;
use std::{
    io,
    net::SocketAddr,
    os::fd::{AsFd as _, OwnedFd},
    path::Path,
    time::Duration,
};
use tokio::{
    io::{Interest, unix::AsyncFd},
    net::{
        UnixStream,
        unix::{OwnedReadHalf, OwnedWriteHalf},
    },
    time::timeout,
};

const CONNECT_DEADLINE: Duration = Duration::from_secs(1);
const HELLO_DEADLINE: Duration = Duration::from_secs(5);
const WRITE_DEADLINE: Duration = Duration::from_secs(5);
/// Longer than the time given for the drain, for the process to be gone; and once more after a SIGKILL.
pub(super) const END_MARGIN: Duration = Duration::from_secs(2);

/// What a proxy says of itself first.
#[derive(Debug, Clone)]
pub(super) struct Hello {
    pub(super) pid: u32,
    pub(super) version: String,
    pub(super) address: SocketAddr,
}

/// A connection whose proxy has said hello.
pub(super) struct Peer {
    pub(super) hello: Hello,
    reader: Reader<OwnedReadHalf>,
    writer: Writer<OwnedWriteHalf>,
    process: AsyncFd<OwnedFd>,
}

/// True for a socket that no process has open.
pub(super) fn nobody_listens(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused)
}

fn timed_out(what: &'static str) -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, what)
}

#[allow(deprecated, reason = "unsound only for types that may close their descriptor early: an OwnedFd does not")]
fn watch(handle: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(handle, Interest::READABLE)
}

impl Peer {
    /// Connects and waits for the hello.
    pub(super) async fn connect(path: &Path) -> io::Result<Self> {
        let stream = timeout(CONNECT_DEADLINE, UnixStream::connect(path)).await;
        let stream = stream.map_err(|_| timed_out("it does not accept"))??;
        let pid = stream.peer_cred()?.pid().ok_or_else(|| io::Error::other("its process id is not known"))?;
        let process = watch(drover_shim::sys::pidfd_open(pid)?)?;
        let (read, write) = stream.into_split();
        let mut reader = Reader::new(read);
        let hello = timeout(HELLO_DEADLINE, reader.next()).await.map_err(|_| timed_out("it does not say hello"))?;
        // It spoke after the descriptor was opened under its pid, so it lived then, and the descriptor is of no other.
        let Some(FromProxy::Hello { pid, version, address }) = hello? else {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "it did not say hello"));
        };
        Ok(Self { hello: Hello { pid, version, address }, reader, writer: Writer::new(write), process })
    }

    /// The next message; `None` when it has closed. Safe to cancel.
    pub(super) async fn next(&mut self) -> io::Result<Option<FromProxy>> {
        self.reader.next().await
    }

    pub(super) async fn send(&mut self, message: &FromAgent) -> io::Result<()> {
        timeout(WRITE_DEADLINE, self.writer.send(message)).await.map_err(|_| timed_out("it does not read"))?
    }

    /// Orders the end and waits until the process is gone; one that lives on after the time given is killed.
    pub(super) async fn end(mut self, within: Duration) -> anyhow::Result<()> {
        let within_ms = u64::try_from(within.as_millis()).unwrap_or(u64::MAX);
        let ordered = self.send(&FromAgent::End { within_ms }).await;
        let patience = if ordered.is_ok() { within.saturating_add(END_MARGIN) } else { Duration::ZERO };
        if timeout(patience, self.gone()).await.is_ok() {
            return Ok(());
        }
        let pid = self.hello.pid;
        tracing::warn!(pid, "the proxy lives on after the time given: it is killed");
        drover_shim::sys::pidfd_signal(self.process.get_ref().as_fd(), Signal::SIGKILL)
            .with_context(|| format!("the proxy (pid {pid}) can't be killed"))?;
        if timeout(END_MARGIN, self.gone()).await.is_err() {
            bail!("the proxy (pid {pid}) lives on after SIGKILL: it hangs in the kernel");
        }
        Ok(())
    }

    /// Waits until the process is gone. Reads on meanwhile, so that the proxy never waits for us.
    pub(super) async fn gone(&mut self) {
        let reading = async { while let Ok(Some(_)) = self.reader.next::<FromProxy>().await {} };
        tokio::select! {
            _ = self.process.readable() => {}
            () = async { reading.await; std::future::pending::<()>().await } => {}
        }
    }
}

/// Ends the proxy that serves a runtime folder, for a program that does not supervise it. False when there was none.
///
/// # Errors
/// It can't be reached, or could not be ended.
pub async fn end_at(runtime_dir: &Path, within: Duration) -> anyhow::Result<bool> {
    let path = runtime_dir.join("proxy.sock");
    match Peer::connect(&path).await {
        Ok(peer) => peer.end(within).await.map(|()| true),
        Err(error) if nobody_listens(&error) => Ok(false),
        Err(error) => Err(error).with_context(|| format!("the proxy at {} can't be reached", path.display())),
    }
}
