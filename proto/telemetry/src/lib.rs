//! Traces and logs of Drover's programs: numbered spans, their spool and their export.
//!
//! Every span that ends after sampling gets a number (epoch, sequence), is appended to a bounded, checksummed spool on disk
//! and is exported from there; only what was acknowledged is freed, and whatever is given up is counted with its reason.
//! So for every epoch `issued = acknowledged + rejected + given up + held`, after `kill -9` too.
//!
//! Owns: the global subscriber ([`init`]), the span source ([`Source`]) with its files, and W3C trace context ([`context`]).
//! Must never: block traced code on the network, panic over a full disk, or trace its own exports.

mod console;
pub mod context;
mod environment;
mod export;
mod grpc;
mod install;
mod log;
mod mapped;
mod processor;
mod queue;
mod resource;
mod sampler;
mod sink;
mod source;
mod spool;

pub use environment::{Exporter, Limits};
pub use grpc::GrpcSink;
pub use install::{Settings, Telemetry, init};
pub use mapped::CountersOnDisk;
pub use processor::Numbering;
pub use sampler::Counting;
pub use sink::{ExportError, Sink};
pub use source::{Checkpoint, Handle, Source};
pub use spool::{Earlier, GivenUp, LifeOnDisk, Reason, SegmentOnDisk, inspect};

/// Attribute of every exported span: its number within its epoch, beginning with 1.
pub const SEQUENCE_ATTRIBUTE: &str = "drover.sequence";
/// Attribute of the resource: the life of the source that numbered the spans.
pub const EPOCH_ATTRIBUTE: &str = "drover.epoch";
