//! Calls to the coordinators: which one to ask, how long to wait, and what an answer that never came means.
//!
//! Owns the connection and its deadlines. Reads go on to the next coordinator when one does not answer, or can't reach the
//! store. A change goes on only when a coordinator says that it did nothing for that reason. One that was sent and not
//! answered is never sent twice: whether it took effect is then not known, and that is what is said.

use crate::failure::{Failure, did_nothing, is_elsewhere};
use drover_proto::{
    transport::{Connection, Secret, Security, Target},
    v1::fleet_service_client::FleetServiceClient,
};
use std::{
    path::Path,
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};
use tonic::{Response, Status};

/// Longest wait for the answer to one call.
const CALL_TIMEOUT: Duration = Duration::from_secs(15);

/// The generated client over a connection with identity.
pub type Fleet = FleetServiceClient<Connection>;

/// Calls coordinators.
#[derive(Debug)]
pub struct Client {
    target: Target,
    addresses: String,
    /// The coordinator that answered last: the next call begins with it.
    first: AtomicUsize,
    connection: tokio::sync::Mutex<Option<Connection>>,
}

/// Identity and its rules, from the options of the command line.
pub fn security(secret_file: Option<&Path>, allow_plaintext: bool) -> Result<Security, Failure> {
    let secret = secret_file.map(Secret::read).transpose()?;
    Ok(Security { secret, allow_plaintext })
}

impl Client {
    /// For these coordinators; connects when the first call is made.
    pub fn new(addresses: &[String], security: &Security) -> Result<Self, Failure> {
        let target = Target::new(addresses, security, None)?;
        let addresses = addresses.join(", ");
        Ok(Self { target, addresses, first: AtomicUsize::new(0), connection: tokio::sync::Mutex::default() })
    }

    /// A call that changes nothing: each coordinator is asked until one answers.
    pub async fn read<T, F>(&self, mut call: impl FnMut(Fleet) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut last = self.unreachable("none was tried");
        for _ in 0..=self.target.len() {
            match self.once(&mut call).await? {
                Ok(answer) => return Ok(answer),
                Err(status) => last = self.failed(&status).await,
            }
        }
        Err(last)
    }

    /// A call that changes one thing or nothing: sent again, to the next coordinator, only after one that did nothing.
    pub async fn write<T, F>(&self, mut call: impl FnMut(Fleet) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.change(&mut call, self.target.len()).await
    }

    /// A call that changes something in several steps: sent once.
    pub async fn write_once<T, F>(&self, mut call: impl FnMut(Fleet) -> F) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        self.change(&mut call, 1).await
    }

    async fn change<T, F>(&self, call: &mut impl FnMut(Fleet) -> F, times: usize) -> Result<T, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let mut last = self.unreachable("none was tried");
        for _ in 0..times {
            let status = match self.once(call).await? {
                Ok(answer) => return Ok(answer),
                Err(status) => status,
            };
            last = self.failed(&status).await;
            if !did_nothing(&status) {
                break;
            }
        }
        Err(match last {
            Failure::Unreachable(text) => Failure::Unreachable(format!(
                "{text}; whether the change took effect is not known: look with `drover get deployments`"
            )),
            other => other,
        })
    }

    /// One attempt. The outer error is final (no coordinator can be connected to, or Drover refused); after the inner one
    /// another coordinator may answer.
    async fn once<T, F>(&self, call: &mut impl FnMut(Fleet) -> F) -> Result<Result<T, Status>, Failure>
    where
        F: Future<Output = Result<Response<T>, Status>>,
    {
        let fleet = FleetServiceClient::new(self.connected().await?)
            .max_decoding_message_size(drover_proto::limits::MESSAGE_BYTES_MAX);
        match tokio::time::timeout(CALL_TIMEOUT, call(fleet)).await {
            Ok(Ok(response)) => Ok(Ok(response.into_inner())),
            Ok(Err(status)) if is_elsewhere(&status) => Ok(Err(status)),
            Ok(Err(status)) => Err(Failure::of_status(&status)),
            Err(_) => Ok(Err(Status::unavailable(format!("no answer within {} s", CALL_TIMEOUT.as_secs())))),
        }
    }

    async fn connected(&self) -> Result<Connection, Failure> {
        let mut connection = self.connection.lock().await;
        if let Some(connection) = connection.as_ref() {
            return Ok(connection.clone());
        }
        let made = self.target.connect(self.first.load(Ordering::Relaxed)).await?;
        Ok(connection.insert(made).clone())
    }

    /// Leaves a connection that failed (in the middle of a stream, say): the next call begins with another coordinator.
    pub async fn forget(&self) {
        *self.connection.lock().await = None;
        self.first.fetch_add(1, Ordering::Relaxed);
    }

    async fn failed(&self, status: &Status) -> Failure {
        self.forget().await;
        match Failure::of_status(status) {
            Failure::Unreachable(text) => self.unreachable(&text),
            other => other,
        }
    }

    fn unreachable(&self, why: &str) -> Failure {
        Failure::Unreachable(format!("no coordinator at {} answered: {why}", self.addresses))
    }
}
