//! The listener goes from a proxy that is about to end to its successor, so that an upgrade turns no request away.
//!
//! The one that ends offers it on a socket of its own, and accepts connections until its successor, which then holds the
//! same listener, does: in no moment does nobody. The successor begins once it has its routes. The connection between the
//! two stays: over it the successor hands on an order to end.

use super::serve::listen_unix;
use anyhow::{Context as _, bail};
use nix::{
    cmsg_space,
    sys::socket::{ControlMessage, ControlMessageOwned, MsgFlags, recvmsg, sendmsg},
};
use std::{
    io::{self, IoSlice, IoSliceMut},
    os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd, RawFd},
    path::{Path, PathBuf},
    time::Duration,
};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, Interest},
    net::{TcpListener, UnixListener, UnixStream},
    time::timeout,
};

/// How long a successor may take to ask for the listener.
const ASK_DEADLINE: Duration = Duration::from_secs(10);
/// How long it may take to accept connections then: it waits for its routes first.
pub(super) const ACCEPT_DEADLINE: Duration = Duration::from_secs(15);
/// How long its routes may take; then it accepts without.
pub(super) const ROUTES_DEADLINE: Duration = Duration::from_secs(10);
/// How long one message may take.
const MESSAGE_DEADLINE: Duration = Duration::from_secs(2);

/// Sent with the listener.
const LISTENER: u8 = b'l';
/// The successor accepts.
const ACCEPTS: u8 = b'a';
/// The successor was ordered to end, and with it whoever drains still.
const END: u8 = b'e';

/// An offer that a successor can take.
#[derive(Debug)]
pub(super) struct Offer {
    listener: UnixListener,
    path: PathBuf,
    /// Nobody has asked yet: the path is this offer's.
    stands: bool,
}

impl Offer {
    /// Makes it.
    pub(super) fn make(path: &Path) -> anyhow::Result<Self> {
        Ok(Self { listener: listen_unix(path)?, path: path.to_owned(), stands: true })
    }

    /// Waits for a successor and gives it the listener, after `release` has let go of what only one can hold. Returns when
    /// the successor accepts connections.
    pub(super) async fn taken(mut self, tcp: &TcpListener, release: impl FnOnce()) -> anyhow::Result<Successor> {
        let (stream, _) = timeout(ASK_DEADLINE, self.listener.accept()).await.context("no successor has asked")??;
        let user = stream.peer_cred()?.uid();
        if user != nix::unistd::geteuid().as_raw() {
            bail!("user {user} has asked for the listener, and is not this proxy's");
        }
        self.withdraw();
        release();
        timeout(MESSAGE_DEADLINE, send_descriptor(&stream, tcp.as_raw_fd())).await.context("the successor hangs")??;
        let mut successor = Successor(stream);
        match timeout(ACCEPT_DEADLINE, successor.0.read_u8()).await.context("the successor does not accept")? {
            Ok(ACCEPTS) => Ok(successor),
            Ok(other) => bail!("the successor says {other}"),
            Err(error) => Err(error).context("the successor has ended before it accepted"),
        }
    }

    /// Before the successor begins: it may be told to end at once, and then makes an offer of its own at the same path.
    fn withdraw(&mut self) {
        if std::mem::replace(&mut self.stands, false) {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

impl Drop for Offer {
    fn drop(&mut self) {
        self.withdraw();
    }
}

/// What the one that ends keeps of its successor.
#[derive(Debug)]
pub(super) struct Successor(UnixStream);

impl Successor {
    /// Waits until the successor says that this one is to end at once. Should it end itself, that never comes.
    pub(super) async fn ordered(&mut self) {
        while let Ok(byte) = self.0.read_u8().await {
            if byte == END {
                return;
            }
        }
        std::future::pending::<()>().await;
    }
}

/// What a successor keeps of the one whose listener it has.
#[derive(Debug)]
pub(super) struct Predecessor(UnixStream);

impl Predecessor {
    /// Tells that connections are accepted here.
    pub(super) async fn accepted(&mut self) {
        // One that is gone has cut what it had: nothing more can be done for it.
        let _ = timeout(MESSAGE_DEADLINE, self.0.write_u8(ACCEPTS)).await;
    }

    /// Orders the end of what drains there still, and waits for it.
    pub(super) async fn end(mut self, within: Duration) {
        let _ = timeout(MESSAGE_DEADLINE, self.0.write_u8(END)).await;
        let _ = timeout(within, self.0.read_u8()).await;
    }
}

/// Asks the proxy that offers its listener there for it; `None` when nobody does.
pub(super) async fn receive(path: &Path) -> anyhow::Result<Option<(TcpListener, Predecessor)>> {
    let stream = match UnixStream::connect(path).await {
        Ok(stream) => stream,
        Err(error) if super::peer::nobody_listens(&error) => return Ok(None),
        Err(error) => return Err(error).with_context(|| format!("{} can't be reached", path.display())),
    };
    let descriptor =
        timeout(MESSAGE_DEADLINE, receive_descriptor(&stream)).await.context("nothing was handed over")??;
    let listener = std::net::TcpListener::from(descriptor);
    listener.set_nonblocking(true)?;
    let listener = TcpListener::from_std(listener).context("what was handed over is no listener")?;
    Ok(Some((listener, Predecessor(stream))))
}

async fn send_descriptor(stream: &UnixStream, descriptor: RawFd) -> io::Result<()> {
    let (byte, descriptors) = ([LISTENER], [descriptor]);
    stream
        .async_io(Interest::WRITABLE, || {
            let rights = [ControlMessage::ScmRights(&descriptors)];
            sendmsg::<()>(stream.as_raw_fd(), &[IoSlice::new(&byte)], &rights, MsgFlags::empty(), None)?;
            Ok(())
        })
        .await
}

#[allow(unsafe_code, reason = "the kernel has just made these descriptors for us: nobody else owns them")]
async fn receive_descriptor(stream: &UnixStream) -> io::Result<OwnedFd> {
    let received = stream
        .async_io(Interest::READABLE, || {
            let (mut byte, mut space) = ([0_u8], cmsg_space!([RawFd; 1]));
            let mut pieces = [IoSliceMut::new(&mut byte)];
            let flags = MsgFlags::MSG_CMSG_CLOEXEC;
            let message = recvmsg::<()>(stream.as_fd().as_raw_fd(), &mut pieces, Some(&mut space), flags)?;
            let mut owned = Vec::new();
            for control in message.cmsgs()? {
                if let ControlMessageOwned::ScmRights(descriptors) = control {
                    // SAFETY: each was received in this very call, so it is open and ours alone.
                    owned.extend(descriptors.into_iter().map(|fd| unsafe { OwnedFd::from_raw_fd(fd) }));
                }
            }
            Ok(owned)
        })
        .await?;
    received.into_iter().next().ok_or_else(|| io::Error::other("no descriptor came with the message"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_listener_stays_open_from_one_to_the_other() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("next.sock");
        assert!(receive(&path).await.unwrap().is_none(), "nobody offers one");
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = tcp.local_addr().unwrap();
        let offer = Offer::make(&path).unwrap();
        let giving = tokio::spawn(async move { (offer.taken(&tcp, || {}).await, tcp) });
        let (taken, mut predecessor) = receive(&path).await.unwrap().unwrap();
        // Accepted by whoever comes first: here it waits until the new one does.
        let client = tokio::net::TcpStream::connect(address).await.unwrap();
        predecessor.accepted().await;
        let (successor, tcp) = giving.await.unwrap();
        drop(tcp);
        let (_, from) = taken.accept().await.unwrap();
        assert_eq!(from, client.local_addr().unwrap());
        assert!(!path.exists());
        let ending = tokio::spawn(predecessor.end(Duration::from_secs(10)));
        successor.unwrap().ordered().await;
        ending.await.unwrap();
    }

    #[tokio::test]
    async fn a_successor_that_dies_before_it_accepts_is_no_successor() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("next.sock");
        let tcp = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let offer = Offer::make(&path).unwrap();
        let giving = tokio::spawn(async move { offer.taken(&tcp, || {}).await.map(drop) });
        drop(receive(&path).await.unwrap().unwrap());
        assert!(giving.await.unwrap().unwrap_err().to_string().contains("before it accepted"));
    }
}
