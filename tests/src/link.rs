//! A TCP line that a test can cut: between one coordinator and etcd, say, while everybody else reaches either.
//!
//! Owns: the listener and what it forwards. It looks at no byte.

use crate::etcd::free_port;
use anyhow::Context as _;
use std::{io, sync::Arc};
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _},
    net::{
        TcpListener, TcpStream,
        tcp::{OwnedReadHalf, OwnedWriteHalf},
    },
    sync::watch,
    task::{JoinHandle, JoinSet},
};

/// How the line is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Whole,
    /// Nothing passes, and nobody is told: a partition.
    Cut,
    /// Connections are broken, and new ones refused: a program that is down.
    Refused,
}

/// A line to a TCP port. What it forwards ends when it is dropped.
#[derive(Debug)]
pub struct Link {
    port: u16,
    state: watch::Sender<State>,
    task: JoinHandle<()>,
}

impl Link {
    /// A line to "http://host:port".
    ///
    /// # Errors
    /// When no port can be bound.
    pub async fn to(endpoint: &str) -> anyhow::Result<Self> {
        let target: Arc<str> = endpoint.trim_start_matches("http://").into();
        let port = free_port()?;
        let listener = listen(port).await.context("a cuttable line")?;
        let (state, line) = watch::channel(State::Whole);
        let task = tokio::spawn(forward(listener, port, target, line));
        Ok(Self { port, state, task })
    }

    /// Its near end, "http://host:port".
    #[must_use]
    pub fn endpoint(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    /// Lets nothing through from now on, in either direction. Connections stay open and new ones are accepted: neither
    /// side is told anything, as when a network is partitioned.
    pub fn cut(&self) {
        self.state.send_replace(State::Cut);
    }

    /// Breaks all connections and refuses new ones.
    pub fn refuse(&self) {
        self.state.send_replace(State::Refused);
    }

    /// Makes it whole again; what was under way when it was cut arrives now.
    pub fn mend(&self) {
        self.state.send_replace(State::Whole);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// The port is out of the range that the kernel hands out, so that it is free again after a refusal.
async fn listen(port: u16) -> io::Result<TcpListener> {
    TcpListener::bind(("127.0.0.1", port)).await
}

async fn forward(listener: TcpListener, port: u16, target: Arc<str>, mut line: watch::Receiver<State>) {
    let mut listener = Some(listener);
    let mut connections = JoinSet::new();
    loop {
        if *line.borrow_and_update() == State::Refused {
            listener = None;
            connections.shutdown().await;
        } else if listener.is_none() {
            // Taken by another for the moment: tried again until it is ours, or until the line is refused once more.
            listener = listen(port).await.ok();
        }
        let accept = async {
            match &listener {
                Some(listener) => listener.accept().await,
                None if *line.clone().borrow() == State::Refused => std::future::pending().await,
                None => {
                    tokio::time::sleep(std::time::Duration::from_millis(20)).await;
                    Err(io::Error::from(io::ErrorKind::AddrInUse))
                }
            }
        };
        let mut changed = line.clone();
        tokio::select! {
            accepted = accept => if let Ok((near, _)) = accepted {
                connections.spawn(carry(near, target.clone(), line.clone()));
            },
            // The handle lives as long as this task.
            _ = changed.changed() => {}
            Some(_) = connections.join_next() => {}
        }
    }
}

async fn carry(near: TcpStream, target: Arc<str>, mut line: watch::Receiver<State>) {
    if whole(&mut line).await.is_err() {
        return;
    }
    // Who can't be reached is shown by our end of the connection.
    let Ok(far) = TcpStream::connect(&*target).await else { return };
    let _ = (near.set_nodelay(true), far.set_nodelay(true));
    let ((near_in, near_out), (far_in, far_out)) = (near.into_split(), far.into_split());
    // When one direction breaks the whole connection does.
    let _ = tokio::try_join!(pump(near_in, far_out, line.clone()), pump(far_in, near_out, line));
}

async fn whole(line: &mut watch::Receiver<State>) -> io::Result<()> {
    line.wait_for(|state| *state == State::Whole).await.map(drop).map_err(io::Error::other)
}

async fn pump(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, mut line: watch::Receiver<State>) -> io::Result<()> {
    let mut buffer = vec![0; 16 << 10];
    loop {
        let read = from.read(&mut buffer).await?;
        // What was read while the line was cut waits here, and all that follows in the kernel's buffers.
        whole(&mut line).await?;
        if read == 0 {
            return to.shutdown().await;
        }
        to.write_all(&buffer[..read]).await?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;
    use tokio::time::timeout;

    const SOON: Duration = Duration::from_secs(5);

    /// Sends a byte and reads the answer.
    async fn asked(stream: &mut TcpStream) -> io::Result<u8> {
        stream.write_all(b"x").await?;
        stream.read_u8().await
    }

    #[tokio::test]
    async fn a_cut_line_is_silent_a_refused_one_breaks_and_a_mended_one_carries_what_waited() {
        let echo = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = echo.local_addr().unwrap();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = echo.accept().await {
                tokio::spawn(async move {
                    let (mut from, mut to) = stream.split();
                    tokio::io::copy(&mut from, &mut to).await
                });
            }
        });
        let link = Link::to(&format!("http://{address}")).await.unwrap();
        let connect = || TcpStream::connect(("127.0.0.1", link.port));
        let mut stream = connect().await.unwrap();
        assert_eq!(timeout(SOON, asked(&mut stream)).await.unwrap().unwrap(), b'x');

        link.cut();
        let mut late = connect().await.unwrap();
        assert!(timeout(Duration::from_millis(200), asked(&mut stream)).await.is_err(), "it is silent");
        assert!(timeout(Duration::from_millis(200), asked(&mut late)).await.is_err(), "so is one made meanwhile");
        link.mend();
        assert_eq!(timeout(SOON, stream.read_u8()).await.unwrap().unwrap(), b'x', "what waited arrives");
        assert_eq!(timeout(SOON, late.read_u8()).await.unwrap().unwrap(), b'x');

        link.refuse();
        assert!(timeout(SOON, stream.read_u8()).await.unwrap().is_err(), "it breaks");
        assert!(connect().await.is_err());
        link.mend();
        let again = timeout(SOON, async {
            loop {
                if let Ok(stream) = connect().await {
                    return stream;
                }
            }
        });
        assert_eq!(timeout(SOON, asked(&mut again.await.unwrap())).await.unwrap().unwrap(), b'x');
    }
}
