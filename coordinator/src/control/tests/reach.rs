//! A coordinator that does not have the store: it says so, hands over what it can't keep, and does not lead.

use super::{super::reach::Reach, faulty::Faulty, *};
use crate::{
    audit::{self, Audit},
    control::sessions::{self, Sessions},
};
use drover_proto::{
    status,
    v1::{Hello, SessionRequest, session_request},
};
use tokio::time::{Instant, sleep, timeout};
use tokio_stream::{StreamExt as _, wrappers::ReceiverStream};
use tonic::Status;

const TTL: Duration = Duration::from_secs(10);
const MOMENT: Duration = Duration::from_secs(2);

async fn reached(reach: &Reach) {
    timeout(WAIT, async {
        while reach.lost().is_some() {
            sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("the store is reached");
}

#[tokio::test(start_paused = true)]
async fn an_outage_counts_from_the_first_question_that_was_not_answered_until_it_is_over() {
    let (world, faulty) = batches::faulty_world().await;
    let reach = Reach::start(world.store.clone(), world.view.clone(), world.events.clone(), world.stop.clone());
    assert!(reach.lost().is_some(), "it was never asked");
    reached(&reach).await;

    // Over before anybody needs to act.
    faulty.blind.send_replace(true);
    assert!(timeout(MOMENT, reach.lost_longer_than(MOMENT * 2)).await.is_err());
    assert!(reach.lost().is_some_and(|lost| lost.why.contains("blind on purpose")), "{reach:?}");
    faulty.blind.send_replace(false);
    assert!(timeout(MOMENT * 10, reach.lost_longer_than(MOMENT * 2)).await.is_err(), "it came back meanwhile");
    reached(&reach).await;

    let begun = Instant::now();
    faulty.blind.send_replace(true);
    reach.lost_longer_than(MOMENT * 2).await;
    let known = begun.elapsed();
    assert!((MOMENT * 2..=MOMENT * 2 + Duration::from_secs(1)).contains(&known), "{known:?}");
    faulty.blind.send_replace(false);
    reached(&reach).await;
    let told = async {
        loop {
            let ring = world.store.list(&keys::events(super::super::events::FLEET)).await.unwrap().items;
            let events = ring.iter().filter_map(|item| records::decode::<record::Event>(item).ok()?.event);
            if events.filter(|event| event.reason == "StoreBack").count() == 2 {
                return;
            }
            sleep(Duration::from_millis(50)).await;
        }
    };
    assert!(timeout(WAIT, told).await.is_ok(), "both outages are told when they are over");
}

fn sessions(world: &World, reach: Reach) -> Sessions {
    Sessions {
        store: world.store.clone(),
        view: world.view.clone(),
        reach,
        events: world.events.clone(),
        statuses: world.statuses.clone(),
        audit: Audit::new(audit::Settings::from_env().unwrap()),
        streams: sessions::Streams::default(),
        refusals: sessions::Refusals::default(),
        settings: sessions::Settings {
            coordinator: "one".to_owned(),
            ttl: TTL,
            heartbeat_interval: Duration::from_secs(3),
        },
        stop: world.stop.clone(),
    }
}

fn hello() -> ReceiverStream<Result<SessionRequest, Status>> {
    let hello = Hello { protocol_min: 1, protocol_max: 1, machine_id: "m".to_owned(), ..Hello::default() };
    let (say, said) = tokio::sync::mpsc::channel(1);
    let message = Some(session_request::Message::Hello(hello));
    say.try_send(Ok(SessionRequest { message })).unwrap();
    // The agent stays, and says no more.
    tokio::spawn(async move { say.closed().await });
    ReceiverStream::new(said)
}

#[tokio::test(start_paused = true)]
async fn a_session_is_handed_over_while_it_lives_and_none_is_taken_by_who_can_not_keep_it() {
    let (world, faulty) = batches::faulty_world().await;
    let reach = Reach::start(world.store.clone(), world.view.clone(), world.events.clone(), world.stop.clone());
    reached(&reach).await;
    let sessions = sessions(&world, reach);
    let mut answers = sessions.serve("a".to_owned(), hello()).await.unwrap();
    faulty.blind.send_replace(true);
    let begun = Instant::now();
    let handed_over = async {
        while let Some(answer) = answers.next().await {
            if let Err(status) = answer {
                return Some(status);
            }
        }
        None
    };
    let status = timeout(TTL, handed_over).await.expect("it is handed over while it lives").expect("and told why");
    assert_eq!(status::reason_of(&status).as_deref(), Some(reason::STORE_UNAVAILABLE));
    // A heartbeat may have been due just before: what is left must do for a Hello elsewhere.
    assert!(begun.elapsed() <= TTL / 2, "{:?}", begun.elapsed());

    let begun = Instant::now();
    let refused = sessions.serve("b".to_owned(), hello()).await.unwrap_err();
    assert_eq!(status::reason_of(&refused).as_deref(), Some(reason::STORE_UNAVAILABLE));
    assert!(begun.elapsed() < Duration::from_millis(100), "{:?}", begun.elapsed());
}

#[tokio::test(start_paused = true)]
async fn who_leads_and_does_not_see_the_store_gives_the_lead_up_and_another_one_takes_it() {
    let memory = Memory::start(1);
    let faulty = Arc::new(Faulty::over(memory.clone()));
    let (one, two) = (World::over(faulty.clone()).await, World::over(Arc::new(memory)).await);
    let lead = |world: &World, id: &str| {
        leader::start(world.store.clone(), world.view.clone(), id.to_owned(), world.stop.clone()).0
    };
    let mut first = lead(&one, "one");
    assert!(timeout(WAIT, first.wait_for(Option::is_some)).await.is_ok());
    let mut second = lead(&two, "two");

    // It still renews its lease and could write.
    faulty.blind.send_replace(true);
    let begun = Instant::now();
    assert!(timeout(WAIT * 6, second.wait_for(Option::is_some)).await.is_ok(), "nobody can lead");
    assert!(begun.elapsed() <= leader::TTL * 2, "{:?}", begun.elapsed());
    assert!(first.borrow().is_none());

    // Nor does it stand while it sees nothing.
    two.stop.cancel();
    assert!(timeout(leader::TTL * 3, first.wait_for(Option::is_some)).await.is_err());
    faulty.blind.send_replace(false);
    assert!(timeout(WAIT, first.wait_for(Option::is_some)).await.is_ok());
}
