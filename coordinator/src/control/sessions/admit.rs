//! PURE. Who may have a session: what an agent says of itself against what the store holds.

use super::open::{Error, refused};
use crate::control::mutant;
use drover_proto::{
    status::reason,
    store::v1::{Schema, Session},
    v1::{Hello, Token},
};
use std::time::Duration;

/// Refuses an agent that knows another store, or this one at a later revision: what it owns could be given away once more
/// under a token that it has seen already.
pub(super) fn check_store(hello: &Hello, schema: &Schema, revision: i64) -> Result<(), Error> {
    let way_out = "restore the newer one; if it is lost, end the node's servers (drover-agent down) and remove the file \
                   \"session\" of its state folder";
    if !hello.store_id.is_empty() && !schema.id.is_empty() && hello.store_id != schema.id {
        let message = format!("the agent knows store {}, this is store {}: {way_out}", hello.store_id, schema.id);
        return Err(refused(reason::STORE_CHANGED, message));
    }
    let told = Token { generation: hello.store_generation, revision: hello.store_revision };
    let seen = hello.runs.iter().filter_map(|run| run.token).fold(told, Token::max);
    let now = Token { generation: schema.generation, revision };
    if seen > now {
        let message = format!(
            "the agent has seen revision {} of generation {} of the store, this one is at revision {} of generation {}: \
             it is an older copy: {way_out}",
            seen.revision, seen.generation, now.revision, now.generation
        );
        return Err(refused(reason::STORE_CHANGED, message));
    }
    Ok(())
}

/// Why an agent does not get the session that is there.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Withheld {
    /// For people.
    pub(super) message: String,
    /// Whether the one that it was kept for can't come back for it: its host was restarted.
    pub(super) orphaned: bool,
}

/// Whether an agent may go on with a session. It must know its id. That does not suffice: a copy of its state folder brings
/// the id along. So the host must not have been restarted since (nothing runs there any more, and a copy on another host
/// shows another boot), and no other agent may be attached to it.
pub(super) fn may_resume(node: &str, session: &Session, hello: &Hello, ttl: Duration) -> Result<(), Withheld> {
    if mutant::on(mutant::name::SESSION_HANDED_TO_ANYBODY) {
        return Ok(());
    }
    let differ = |a: &str, b: &str| !a.is_empty() && !b.is_empty() && a != b;
    let withheld = |message: String, orphaned| Err(Withheld { message, orphaned });
    let ms = ttl.as_millis();
    let known = [&hello.resume_session_id, &hello.new_session_id].into_iter().any(|id| *id == session.session_id);
    if !known {
        let what = format!(
            "{node} has a session that this agent does not know; it ends within {ms} ms unless its owner returns"
        );
        return withheld(what, false);
    }
    if differ(&session.boot_id, &hello.boot_id) {
        let what = format!(
            "the session of {node} is that of another boot: either this host was restarted, and the session ends within \
             {ms} ms, or the state folder is a copy of another host's: give this host a name and a state folder of its own"
        );
        return withheld(what, true);
    }
    if differ(&session.agent_id, &hello.agent_id) && !session.stream.is_empty() {
        let what = format!(
            "another agent is attached to the session of {node}, at coordinator {}: either an earlier one has just ended, \
             which passes within {ms} ms, or the state folder is a copy: run one agent per node",
            session.coordinator
        );
        return withheld(what, false);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_proto::v1::RecordedRun;

    const TTL: Duration = Duration::from_secs(10);

    fn text(s: &str) -> String {
        s.to_owned()
    }

    fn session() -> Session {
        let [session_id, boot_id, agent_id, stream] = ["s", "boot", "agent", "stream"].map(text);
        Session { session_id, boot_id, agent_id, stream, coordinator: text("one"), ..Session::default() }
    }

    fn hello(id: &str, boot: &str, agent: &str) -> Hello {
        let [resume_session_id, boot_id, agent_id] = [id, boot, agent].map(text);
        Hello { resume_session_id, boot_id, agent_id, ..Hello::default() }
    }

    #[test]
    fn a_session_is_for_the_agent_that_knows_it_on_the_boot_that_it_was_opened_in() {
        let says = |session: &Session, hello: &Hello| {
            may_resume("a", session, hello, TTL).err().map_or(String::new(), |w| w.message)
        };
        assert_eq!(says(&session(), &hello("s", "boot", "agent")), "", "it moves to another stream");
        assert!(says(&session(), &hello("t", "boot", "agent")).contains("does not know"));
        assert!(says(&session(), &hello("", "boot", "agent")).contains("does not know"));
        assert!(says(&session(), &hello("s", "boot", "copy")).contains("another agent is attached"));
        assert!(says(&session(), &hello("s", "other", "copy")).contains("another boot"));
        // The agent before it has ended.
        let free = Session { stream: String::new(), ..session() };
        assert_eq!(says(&free, &hello("s", "boot", "next")), "");
        assert!(says(&free, &hello("s", "other", "next")).contains("another boot"));
        // It was opened, and the answer was lost.
        let asked = Hello { new_session_id: text("s"), ..hello("older", "boot", "agent") };
        assert_eq!(says(&session(), &asked), "");
        // Programs that don't say, or whose record an older coordinator has written.
        assert_eq!(says(&session(), &hello("s", "", "")), "");
        let old = Session { session_id: text("s"), ..Session::default() };
        assert_eq!(says(&old, &hello("s", "boot", "agent")), "");
    }

    #[test]
    fn an_agent_that_knows_another_store_or_a_later_revision_is_refused() {
        let schema = Schema { generation: 2, id: text("one"), ..Schema::default() };
        let says = |store_id: &str, store_generation, store_revision, run: i64| {
            let token = Some(Token { generation: store_generation, revision: run });
            let runs = vec![RecordedRun { token, ..RecordedRun::default() }];
            let hello = Hello { store_id: text(store_id), store_generation, store_revision, runs, ..Hello::default() };
            check_store(&hello, &schema, 50).err().map_or(String::new(), |e| e.to_string())
        };
        assert_eq!(says("one", 2, 50, 40), "");
        assert_eq!(says("", 0, 0, 0), "");
        assert_eq!(says("one", 1, 900, 900), "", "a restore has raised the generation");
        assert!(says("two", 1, 10, 10).contains("knows store two, this is store one"));
        assert!(says("one", 3, 10, 10).contains("older copy"));
        assert!(says("one", 2, 51, 10).contains("revision 51"));
        assert!(says("", 2, 0, 52).contains("revision 52"), "an older agent says it by what it runs");
    }
}
