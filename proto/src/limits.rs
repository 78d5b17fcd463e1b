//! Bounds that both sides of the contract know. What an operator may change is configuration; these are the defaults and
//! the outer limits.

use std::time::Duration;

/// Time to live of a session's lease.
pub const SESSION_TTL: Duration = Duration::from_secs(10);
/// How often an agent sends a heartbeat.
pub const HEARTBEAT_INTERVAL: Duration = Duration::from_secs(3);
/// Longest planned absence of an agent for which its session is kept.
pub const ABSENCE_MAX: Duration = Duration::from_secs(600);
/// Largest gRPC message that is read, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 4 << 20;
/// Largest request body that the gateway reads by default, in bytes.
pub const BODY_BYTES_MAX: usize = 16 << 20;
/// Most instances of one deployment.
pub const REPLICAS_MAX: i32 = 1000;
/// Most slots of one instance.
pub const SLOTS_MAX: i32 = 256;
/// Largest context of one slot, in tokens.
pub const CONTEXT_TOKENS_MAX: i32 = 16 << 20;
/// Most threads of one instance.
pub const THREADS_MAX: i32 = 1024;
/// Largest reservation of one instance, in bytes.
pub const MEMORY_BYTES_MAX: i64 = 64 << 40;
/// Longest duration in a deployment, in milliseconds: one day.
pub const DURATION_MS_MAX: i64 = 86_400_000;
/// Most extra arguments of one deployment.
pub const ARGUMENTS_MAX: usize = 128;
/// Most bytes of a deployment's arguments and labels together: the specs of all claims of one call fit into its answer
/// ([`CLAIMS_PER_CALL_MAX`], [`MESSAGE_BYTES_MAX`]).
pub const WORDS_BYTES_MAX: usize = 64 << 10;
/// Most labels of a node or a deployment.
pub const LABELS_MAX: usize = 64;
/// Results of a page when the caller names no size.
pub const PAGE_SIZE: usize = 100;
/// Most results of a page.
pub const PAGE_SIZE_MAX: usize = 1000;
/// Most claims of one call: each takes three comparisons and three reads of a transaction, which has 128 of each.
pub const CLAIMS_PER_CALL_MAX: usize = 32;
/// Events kept for each object.
pub const EVENTS_PER_OBJECT: u64 = 64;

/// Defaults of a deployment's fields.
pub mod defaults {
    /// Context of one slot, in tokens.
    pub const CONTEXT_TOKENS: i32 = 4096;
    /// Slots of an instance.
    pub const SLOTS: i32 = 4;
    /// Added to the size of the model file when a deployment names no memory, in bytes.
    pub const MEMORY_OVERHEAD_BYTES: i64 = 256 << 20;
    /// Longest wait for requests in flight before a stop, in milliseconds.
    pub const DRAIN_TIMEOUT_MS: i64 = 30_000;
    /// Time between SIGTERM and SIGKILL, in milliseconds.
    pub const STOP_GRACE_MS: i64 = 10_000;
    /// Longest time without progress while a model loads, in milliseconds.
    pub const LOAD_TIMEOUT_MS: i64 = 300_000;
}

/// Ports, when nothing else is configured.
pub mod ports {
    /// gRPC of a coordinator.
    pub const GRPC: u16 = 7400;
    /// HTTP of a coordinator: gateway, metrics, health.
    pub const HTTP: u16 = 7401;
    /// Proxy of a node.
    pub const PROXY: u16 = 7410;
}
