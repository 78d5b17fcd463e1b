//! What the agent itself keeps of a claim, beside the shim's files: what is to run, and what was learnt about it.
//!
//! File `claim` of an instance's directory; written by the agent alone.

use drover_proto::v1::{DeploymentSpec, InstanceState, OnLeaseLost, Token};
use drover_shim::{durable, record};
use prost::Message as _;
use prost_types::Timestamp;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Format of the file.
const FORMAT: u32 = 1;
/// Name of the file.
const FILE_NAME: &str = "claim";

/// A claim of this node.
#[derive(Debug, Clone, PartialEq)]
pub struct Claim {
    /// Id of the instance.
    pub instance: String,
    /// Token, as last learnt.
    pub token: Token,
    /// What is to run.
    pub spec: DeploymentSpec,
    /// Revision of the deployment's spec.
    pub revision: u64,
    /// Memory reserved, in bytes.
    pub memory_bytes: i64,
    /// Restarts under this claim.
    pub restarts: i32,
    /// Why it can't run, once that is known.
    pub failed: Option<String>,
    /// The last state that outlives an agent, ready or failed, and since when it is in it.
    pub since: Option<(InstanceState, Timestamp)>,
}

/// As it stands in the file.
#[derive(Serialize, Deserialize)]
struct Stored {
    format: u32,
    instance: String,
    token: record::Token,
    /// The spec as protobuf in hexadecimal digits: fields that this version does not know survive.
    spec: String,
    revision: u64,
    memory_bytes: i64,
    restarts: i32,
    failed: Option<String>,
    /// State, as its number in the contract; seconds and nanoseconds since the Unix epoch.
    #[serde(default)]
    since: Option<(i32, i64, i32)>,
}

/// The file, in an instance's directory.
#[must_use]
pub fn path(directory: &Path) -> PathBuf {
    directory.join(FILE_NAME)
}

/// The contract's token as the shim keeps it.
#[must_use]
pub fn stored_token(token: Token) -> record::Token {
    record::Token { generation: token.generation, revision: token.revision }
}

/// The shim's token as the contract has it.
#[must_use]
pub fn token(stored: record::Token) -> Token {
    Token { generation: stored.generation, revision: stored.revision }
}

impl Claim {
    /// Whether it stands for one whose file was lost: then it says only which instance this is.
    #[must_use]
    pub fn is_lost(&self) -> bool {
        self.revision == 0
    }

    /// Whether its server ends with the lease that the claim hangs on.
    #[must_use]
    pub fn ends_with_lease(&self) -> bool {
        self.spec.on_lease_lost() == OnLeaseLost::Stop
    }

    /// Reads the claim of an instance's directory.
    pub fn read(directory: &Path) -> Result<Self, durable::Error> {
        let path = path(directory);
        let stored: Stored = durable::read(&path)?;
        let damaged = |what: String| durable::Error::Damaged { path: path.clone(), what };
        let bytes = unhex(&stored.spec).ok_or_else(|| damaged("its spec is not hexadecimal".to_owned()))?;
        let spec = DeploymentSpec::decode(bytes.as_slice()).map_err(|e| damaged(e.to_string()))?;
        Ok(Self {
            instance: stored.instance,
            token: token(stored.token),
            spec,
            revision: stored.revision,
            memory_bytes: stored.memory_bytes,
            restarts: stored.restarts,
            failed: stored.failed,
            since: stored.since.and_then(|(state, seconds, nanos)| {
                Some((InstanceState::try_from(state).ok()?, Timestamp { seconds, nanos }))
            }),
        })
    }

    /// Writes it; returns after the disk has it.
    pub fn write(&self, directory: &Path) -> Result<(), durable::Error> {
        durable::write(&path(directory), &self.stored())
    }

    /// Writes it so that it survives this process; a crash of the host may take it along.
    pub fn place(&self, directory: &Path) -> Result<(), durable::Error> {
        durable::place(&path(directory), &self.stored())
    }

    fn stored(&self) -> Stored {
        Stored {
            format: FORMAT,
            instance: self.instance.clone(),
            token: stored_token(self.token),
            spec: self.spec.encode_to_vec().iter().map(|byte| format!("{byte:02x}")).collect(),
            revision: self.revision,
            memory_bytes: self.memory_bytes,
            restarts: self.restarts,
            failed: self.failed.clone(),
            since: self.since.map(|(state, at)| (state.into(), at.seconds, at.nanos)),
        }
    }
}

fn unhex(text: &str) -> Option<Vec<u8>> {
    let digits = text.as_bytes();
    let digit = |byte: u8| char::from(byte).to_digit(16).and_then(|d| u8::try_from(d).ok());
    if !digits.len().is_multiple_of(2) {
        return None;
    }
    digits.chunks(2).map(|pair| Some(digit(pair[0])? << 4 | digit(pair[1])?)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_claim_is_read_as_it_was_written() {
        let place = tempfile::tempdir().unwrap();
        let claim = Claim {
            instance: "tiny-234567".to_owned(),
            token: Token { generation: 2, revision: 77 },
            spec: DeploymentSpec { name: "tiny".to_owned(), slots: Some(2), ..DeploymentSpec::default() },
            revision: 3,
            memory_bytes: 1 << 30,
            restarts: 4,
            failed: Some("because".to_owned()),
            since: Some((InstanceState::Failed, Timestamp { seconds: 1_700_000_000, nanos: 5 })),
        };
        claim.write(place.path()).unwrap();
        assert_eq!(Claim::read(place.path()).unwrap(), claim);
    }
}
