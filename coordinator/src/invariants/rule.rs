//! The rules, by name.

use std::fmt;

/// A rule. Each is what a reader of the history can see, and needs no knowledge of why something was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rule {
    /// A claim is made where there is none; it is made and removed, never rewritten.
    SecondClaim,
    /// In R the session is put with version + 1, and the mark of the last claim made with the claim's node and nonce.
    ClaimNotByTransaction,
    /// A claim hangs on the lease of its session.
    ClaimWithoutLease,
    /// The session is in S at the id and the revision that the request named.
    ClaimOfMovedSession,
    /// The offer that the request took up stands in S and names the node; what is claimed again is wanted.
    ClaimNotOffered,
    /// In S no claim was made since the offer that the request took up.
    OfferServedTwice,
    /// Nothing is claimed under a halt but what runs already, and that under level "claims" only.
    ClaimUnderHalt,
    /// What a node claims by offers fits beside its other claims into the largest capacity it has named in this session.
    Oversold,
    /// A session is created, or goes on with its id and version + 1.
    SessionRewritten,
    /// A claim goes with its session, with the report of its end, with its instance's record by the leader, or by a restore. One
    /// of what serves is not given up to others.
    ClaimVanished,
    /// A status is put while the claim of its token stands in S, for its node.
    StaleEffect,
    /// So is the record of a run.
    StaleRun,
    /// A status does not follow one under the same token that came by a newer stream of its node.
    OlderReport,
    /// A run's record goes with a valid report of its node, with its instance or its node, or once no claim covers it.
    RunRemoved,
    /// A creation makes no more wanted instances of a deployment's present revision than it asks for.
    SurplusInstance,
    /// What was claimed before is offered elsewhere no sooner than the grace period after its leader began.
    ReplacedInGrace,
    /// A node that has just joined is offered nothing before it has said in that session what runs there; one that never
    /// says it is waited for as long as the grace period.
    OfferedBeforeInventory,
    /// A welcome resumes the session that its hello has named, and no other that stood.
    SessionHandedOver,
    /// Each welcome names a revision of the session that was written after its hello came.
    ResumedWithoutBump,
    /// A restore raises the generation above all that were given, and leaves no session and no claim.
    RestoredAsItWas,
    /// Every token that is told is of the store's generation.
    TokenOfOtherGeneration,
    /// The token of a claim that is answered as made is in the history, with the node and the nonce of the request.
    AnsweredUnknownClaim,
    /// An order to end a run holds at the revision of its set: the token it yields to is ready and higher, or nobody wants it.
    DrainOrder,
    /// What an agent takes for its deadline is no later than the end of its session's lease.
    DeadlineBeyondLease,
    /// A lease is renewed at most once for each heartbeat, resume or promise of a return.
    RenewedWithoutHeartbeat,
    /// What is released on a host was claimed by its node under that token.
    StartedWithoutClaim,
    /// It is released before the lease of its claim runs out.
    StartedTooLate,
    /// No higher token is on the host's disk for that instance, or was released there.
    LowerTokenStarted,
    /// An instance has one live process on a host, and one under one token anywhere.
    SecondProcess,
    /// Live servers of a host fit into its memory.
    HostOversold,
    /// A ready server is signalled only when, since its token, it was unwanted or a higher claim of it was ready, or when
    /// its lease was not renewed and its deployment says `on_lease_lost = "stop"`.
    SignalledWhileWanted,
    /// Where it says so, no process lives when its claim goes with the lease.
    OutlivedLease,
    /// A task of a program has panicked.
    Panicked,
    /// When all faults have ended the fleet comes to what was asked of it.
    EndState,
}

impl Rule {
    /// Those that the store's history alone shows broken, which every replica sees.
    pub const OF_HISTORY: [Self; 17] = [
        Self::SecondClaim,
        Self::ClaimNotByTransaction,
        Self::ClaimWithoutLease,
        Self::ClaimOfMovedSession,
        Self::ClaimNotOffered,
        Self::OfferServedTwice,
        Self::ClaimUnderHalt,
        Self::Oversold,
        Self::SessionRewritten,
        Self::ClaimVanished,
        Self::StaleEffect,
        Self::StaleRun,
        Self::OlderReport,
        Self::RunRemoved,
        Self::SurplusInstance,
        Self::ReplacedInGrace,
        Self::OfferedBeforeInventory,
    ];
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// A rule that was broken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Which.
    pub rule: Rule,
    /// Revision of the store; of the last one known where the store was not written.
    pub revision: i64,
    /// When, in milliseconds since the epoch.
    pub at_ms: i64,
    /// The key, instance or node.
    pub object: String,
    /// What was seen, and what should have been.
    pub message: String,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} at revision {} ({}): {}", self.rule, self.revision, self.object, self.message)
    }
}
