//! Signals that end `drover dev`: the first begins the end, the second hurries it. Neither ends this process by itself.

use std::io;
use tokio::{
    signal::unix::{SignalKind, signal},
    sync::watch,
};

/// SIGINT, SIGTERM and SIGHUP.
#[derive(Debug)]
pub struct Signals {
    first: watch::Receiver<Option<u8>>,
    hurry: watch::Receiver<bool>,
}

impl Signals {
    /// From now on these signals are ours.
    pub fn listen() -> io::Result<Self> {
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let (told, first) = watch::channel(None);
        let (hurry_told, hurry) = watch::channel(false);
        tokio::spawn(async move {
            loop {
                let number = tokio::select! {
                    _ = interrupt.recv() => 2,
                    _ = terminate.recv() => 15,
                    _ = hangup.recv() => 1,
                };
                if told.borrow().is_some() {
                    hurry_told.send_replace(true);
                } else {
                    told.send_replace(Some(number));
                }
            }
        });
        Ok(Self { first, hurry })
    }

    /// Waits for the first; gives its number.
    pub async fn first(&mut self) -> u8 {
        match self.first.wait_for(Option::is_some).await {
            Ok(number) => number.unwrap_or(15),
            // The task lives as long as the runtime.
            Err(_) => std::future::pending().await,
        }
    }

    /// Turns true at the second.
    #[must_use]
    pub fn hurry(&self) -> watch::Receiver<bool> {
        self.hurry.clone()
    }
}
