//! The agent's deliberate breakages; the switch is [`drover_proto::mutant`].

pub use drover_proto::mutant::on;

/// Names of breakages.
pub mod name {
    /// Claims stay with a coordinator that can't make them.
    pub const CLAIMS_STAY: &str = "claims-stay";
    /// A lease lives from when the answer to its renewal was heard, not from when that was asked for.
    pub const DEADLINE_FROM_RECEIVE_TIME: &str = "deadline-from-receive-time";
    /// A store that was lost and begun anew, or an older copy, is taken for the one that is known.
    pub const AGENT_IGNORES_STORE_ID: &str = "agent-ignores-store-id";
    /// Until when an offer stands is told by the coordinator's wall clock, and looked up on this host's.
    pub const OFFERS_BY_TWO_CLOCKS: &str = "offers-by-two-clocks";
    /// Sets of claims and tokens are compared by their revisions alone.
    pub const REVISION_WITHOUT_GENERATION: &str = "revision-without-generation";
    /// What no claim of this node covers is started again when its server has ended.
    pub const START_WITHOUT_CLAIM: &str = "start-without-claim";
    /// What was claimed under a session that is gone is started under the next one.
    pub const START_UNDER_A_LOST_SESSION: &str = "start-under-a-lost-session";
}
