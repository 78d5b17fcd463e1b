//! Deliberate breakages, for tests that must be seen to fail; switched by [`drover_proto::mutant`].

/// Names of breakages.
pub mod name {
    /// The claim transaction does not compare that there is no claim yet.
    pub const CLAIM_WITHOUT_CREATE_COMPARE: &str = "claim-without-create-compare";
    /// A leader whose view is stale leads on.
    pub const BLIND_LEADER: &str = "blind-leader";
    /// A coordinator without the store keeps its sessions.
    pub const NO_HAND_OVER: &str = "no-hand-over";
    /// What nodes and the store say differently is not looked for.
    pub const NO_RECONCILE: &str = "no-reconcile";
    /// A fresh leader, and one that sees the store again after a break, replaces what has no claim at once.
    pub const NO_GRACE_PERIOD: &str = "no-grace-period";
    /// A node is offered instances before it has said what runs on it.
    pub const OFFERS_BEFORE_INVENTORY: &str = "offers-before-inventory";
    /// The gateway routes by standing claims alone.
    pub const ROUTES_BY_CLAIM_ONLY: &str = "routes-by-claim-only";
    /// A run that is not owned is ended though the higher token that took it over is not reported ready.
    pub const DRAIN_BEFORE_READY: &str = "drain-before-ready";
    /// Replacement goes on whatever share of the nodes is lost.
    pub const NO_FREEZE: &str = "no-freeze";
    /// A claim that gets nowhere stands for ever.
    pub const NOTHING_IS_GIVEN_UP: &str = "nothing-is-given-up";
    /// A claim is given up whatever has become of it since that was decided.
    pub const GIVES_UP_BLINDLY: &str = "gives-up-blindly";
    /// Who is avoided may claim again what it still runs.
    pub const AVOIDED_CLAIMS_AGAIN: &str = "avoided-claims-again";
    /// As many instances are replaced at once as are lost.
    pub const NO_RATE_LIMIT: &str = "no-rate-limit";
    /// The leader plans on while it is not known what has become of its last plan.
    pub const ACTING_ON_UNKNOWN_OUTCOME: &str = "acting-on-unknown-outcome";
    /// The claim transaction does not compare the session.
    pub const CLAIM_WITHOUT_SESSION_COMPARE: &str = "claim-without-session-compare";
    /// A claim hangs on no lease.
    pub const CLAIM_WITHOUT_LEASE: &str = "claim-without-lease";
    /// The claim transaction compares nothing.
    pub const CLAIM_BY_BLIND_PUT: &str = "claim-by-blind-put";
    /// The claim transaction compares the session as this coordinator sees it, not as the request names it.
    pub const SESSION_REVISION_RE_READ: &str = "session-revision-re-read";
    /// The claim transaction does not compare the last claim made.
    pub const OFFER_SERVED_TWICE: &str = "offer-served-twice";
    /// A claim whose transaction was not answered counts as made.
    pub const ACTS_ON_UNKNOWN_OUTCOME: &str = "acts-on-unknown-outcome";
    /// A session's lease is renewed without being asked for it.
    pub const RENEWAL_WITHOUT_HEARTBEAT: &str = "renewal-without-heartbeat";
    /// A resume leaves the session as it was.
    pub const RESUME_WITHOUT_BUMP: &str = "resume-without-bump";
    /// The order to end a run names no token that it yields to.
    pub const DRAIN_ORDER_WITHOUT_TOKEN: &str = "drain-order-without-token";
    /// Status is written without comparing the claim.
    pub const STATUS_WITHOUT_FENCE: &str = "status-without-fence";
    /// What a node has said on an older stream replaces what it has said since on another.
    pub const REPORTS_OF_AN_OLDER_STREAM: &str = "reports-of-an-older-stream";
    /// A session is resumed by whoever asks, whatever it knows and wherever it runs.
    pub const SESSION_HANDED_TO_ANYBODY: &str = "session-handed-to-anybody";
    /// A planned absence is written whichever stream the agent is attached by now.
    pub const ABSENCE_WITHOUT_STREAM_COMPARE: &str = "absence-without-stream-compare";
    /// A planned absence ends with the coordinator that was told of it.
    pub const ABSENCE_KEPT_BY_ONE: &str = "absence-kept-by-one";
    /// Runs of instances that the store does not know are ended whatever store they were claimed in.
    pub const ENDS_WHAT_IT_NEVER_KNEW: &str = "ends-what-it-never-knew";
    /// A record that can't be read counts as none.
    pub use crate::store::records::UNREADABLE_SAYS_NO;
    /// Tokens are told as those of the first generation, whatever generation the store is of.
    pub const TOKEN_WITHOUT_GENERATION: &str = "token-without-generation";
    /// A restore leaves the generation as it was.
    pub use crate::store::restore::GENERATION_STAYS;
    /// Writes do not compare what the store is, whose revisions may come again after a restore.
    pub const NO_SCHEMA_COMPARE: &str = "no-schema-compare";
}

pub use drover_proto::mutant::on;

/// The generation that a token is told with.
pub(super) fn told_generation(generation: u64) -> u64 {
    if on(name::TOKEN_WITHOUT_GENERATION) { 1 } else { generation }
}
