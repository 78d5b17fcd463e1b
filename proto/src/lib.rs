//! The contract between Drover's programs: generated code, and the few things that both sides must agree on.
//!
//! Owns: messages and services ([`v1`], [`store`]), names and ids ([`ids`]), bounds ([`limits`]), who a peer is and how
//! programs connect ([`transport`], [`http_server`]), statuses with details ([`status`]), the text forms of messages ([`text`]), how
//! configuration files are read ([`config`]), and where programs meet time and chance ([`world`]). Must never: know etcd, processes or placement.

pub mod allocator;
pub mod arguments;
pub mod config;
pub mod files;
pub mod http_server;
pub mod ids;
pub mod limits;
pub mod mutant;
pub mod status;
pub mod text;
pub mod token;
pub mod transport;
pub mod world;

/// Package `drover.v1`: the public contract.
#[allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications, rust_2018_idioms)]
pub mod v1 {
    tonic::include_proto!("drover.v1");
}

/// Package `drover.store.v1`: the records that coordinators keep in the store.
pub mod store {
    /// Version 1 of the records.
    #[allow(missing_docs, clippy::all, clippy::pedantic, unused_qualifications, rust_2018_idioms)]
    pub mod v1 {
        tonic::include_proto!("drover.store.v1");
    }
}

/// Descriptors of the whole contract, for server reflection and for the text forms.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/drover.bin"));

/// Lowest protocol version that this build speaks on a session.
pub const PROTOCOL_MIN: u32 = 1;
/// Highest protocol version that this build speaks on a session.
pub const PROTOCOL_MAX: u32 = PROTOCOL_LEASE_LOST;
/// The first in which an agent knows `on_lease_lost`: an older one would keep what is to end.
pub const PROTOCOL_LEASE_LOST: u32 = 2;

/// Version of this build, as shown to people and to peers.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
