//! A node by hand: a real session over the real protocol, and claims of which each is made when the test says so. It runs
//! nothing.

use crate::cluster::{Cluster, SOON};
use anyhow::{Context as _, bail, ensure};
use drover_proto::{
    status,
    transport::Connection,
    v1::{
        Capacity, ClaimItem, ClaimManyRequest, ClaimManyResponse, ClaimRequest, Heartbeat, Hello, InstanceState,
        ModelFile, ModelInventory, RunSet, SessionRequest, StatusReport, Token, node_service_client::NodeServiceClient,
        session_request, session_response::Message,
    },
};
use std::time::Duration;
use tokio::{sync::mpsc, time::timeout};
use tokio_stream::wrappers::ReceiverStream;

/// Offers that wait to be looked at.
const OFFERS_WAITING: usize = 8192;
/// Answers to reports that wait to be looked at.
const ACKS_WAITING: usize = 16;

/// One node. Its session ends when it is dropped.
#[derive(Debug)]
pub struct Node {
    /// Its name.
    pub name: String,
    client: NodeServiceClient<Connection>,
    session_id: String,
    session_revision: i64,
    requests: mpsc::Sender<SessionRequest>,
    /// (instance, revision) of each offer that comes.
    offers: mpsc::Receiver<(String, i64)>,
    /// Whether each report was recorded; beyond a few that nobody has looked at they are passed over.
    acks: mpsc::Receiver<bool>,
}

impl Node {
    /// Opens the session of node `n`, at the coordinators in turn.
    ///
    /// # Errors
    /// When it is refused.
    pub async fn join(cluster: &Cluster, n: usize) -> anyhow::Result<Self> {
        let name = format!("n{n:03}");
        let connection = cluster.connect(n % cluster.coordinators.len(), Some(&name)).await?;
        let mut client = NodeServiceClient::new(connection);
        let (send, requests) = mpsc::channel(64);
        let models = ModelInventory {
            roots: vec!["/models".to_owned()],
            files: vec![ModelFile { path: "/models/tiny.gguf".to_owned(), size_bytes: 1 }],
            truncated: false,
        };
        let hello = Hello {
            protocol_min: 1,
            protocol_max: 1,
            agent_version: "test".to_owned(),
            machine_id: format!("machine-{n}"),
            boot_id: "boot".to_owned(),
            capacity: Some(Capacity { memory_bytes: 1 << 45, cpus: 1, gpus: vec![] }),
            models: Some(models),
            ..Hello::default()
        };
        send.send(SessionRequest { message: Some(session_request::Message::Hello(hello)) }).await?;
        let mut answers = client.session(ReceiverStream::new(requests)).await?.into_inner();
        let Some(Message::Welcome(welcome)) = answers.message().await?.and_then(|m| m.message) else {
            bail!("{name} was not welcomed")
        };
        let inventory = session_request::Message::Runs(RunSet { reconciled: true, ..RunSet::default() });
        send.send(SessionRequest { message: Some(inventory) }).await?;
        let (offered, offers) = mpsc::channel(OFFERS_WAITING);
        let (told, acks) = mpsc::channel(ACKS_WAITING);
        let interval = Duration::from_millis(u64::try_from(welcome.heartbeat_interval_ms)?);
        let (beats, closed) = (send.downgrade(), offered.clone());
        tokio::spawn(async move {
            let mut beat = tokio::time::interval(interval);
            for sequence in 1.. {
                tokio::select! {
                    _ = beat.tick() => {}
                    () = closed.closed() => return,
                }
                let message = Some(session_request::Message::Heartbeat(Heartbeat { sequence }));
                let Some(send) = beats.upgrade() else { return };
                if send.send(SessionRequest { message }).await.is_err() {
                    return;
                }
            }
        });
        tokio::spawn(async move {
            while let Ok(Some(answer)) = answers.message().await {
                let heard = match answer.message {
                    Some(Message::Offer(offer)) => offered.send((offer.instance, offer.offer_revision)).await.is_ok(),
                    Some(Message::StatusAck(ack)) => told.try_send(ack.accepted).is_ok() || !told.is_closed(),
                    _ => true,
                };
                if !heard {
                    return;
                }
            }
        });
        let (session_id, session_revision) = (welcome.session_id, welcome.session_revision);
        Ok(Self { name, client, session_id, session_revision, requests: send, offers, acks })
    }

    /// Waits for the next offer of an instance of `deployment`: its id, and the revision of the offer.
    ///
    /// # Errors
    /// When none comes.
    pub async fn offer(&mut self, deployment: &str) -> anyhow::Result<(String, i64)> {
        let wanted = async {
            while let Some(offer) = self.offers.recv().await {
                if offer.0.starts_with(&format!("{deployment}-")) {
                    return Ok(offer);
                }
            }
            bail!("the session of {} has ended", self.name)
        };
        timeout(SOON, wanted).await.with_context(|| format!("no offer of {deployment} came to {}", self.name))?
    }

    /// Claims an instance by its offer, or again as one that runs here: alone, or by the call that takes several. True when
    /// it won.
    ///
    /// # Errors
    /// Any refusal but a lost race.
    pub async fn claim(&mut self, offer: &(String, i64), again: bool, many: bool) -> anyhow::Result<bool> {
        let mut item = self.item(offer);
        if again {
            (item.offer_revision, item.recorded_token) = (0, Some(Token { generation: 1, revision: 1 }));
        }
        let outcome = if many {
            let answer = self.claim_many(vec![item]).await?;
            let result = answer.results.first().context("no result")?;
            if result.token.is_some() { Ok(()) } else { Err(result.reason.clone()) }
        } else {
            let made = self.claim_one(item).await;
            made.map(drop).map_err(|refusal| status::reason_of(&refusal).unwrap_or(refusal.to_string()))
        };
        let Err(why) = outcome else { return Ok(true) };
        let lost = [status::reason::ALREADY_CLAIMED, status::reason::OFFER_GONE].contains(&why.as_str());
        ensure!(lost, "{}: {why}", self.name);
        Ok(false)
    }

    /// The claim of what was offered.
    #[must_use]
    pub fn item(&self, (instance, offer_revision): &(String, i64)) -> ClaimItem {
        ClaimItem {
            instance: instance.clone(),
            offer_revision: *offer_revision,
            nonce: format!("{}-{instance}", self.name),
            memory_bytes: 1,
            ..ClaimItem::default()
        }
    }

    /// Makes one claim; returns its token.
    ///
    /// # Errors
    /// The refusal, or why there is no answer.
    pub async fn claim_one(&mut self, item: ClaimItem) -> Result<Token, tonic::Status> {
        let request = ClaimRequest {
            session_id: self.session_id.clone(),
            session_revision: self.session_revision,
            instance: item.instance,
            offer_revision: item.offer_revision,
            nonce: item.nonce,
            memory_bytes: item.memory_bytes,
            recorded_token: item.recorded_token,
            halt_generation: 0,
        };
        let answer = self.client.claim(request).await?.into_inner();
        self.session_revision = answer.session_revision;
        answer.token.ok_or_else(|| tonic::Status::internal("a claim without a token"))
    }

    /// Makes several claims by one call.
    ///
    /// # Errors
    /// When the call fails.
    pub async fn claim_many(&mut self, claims: Vec<ClaimItem>) -> anyhow::Result<ClaimManyResponse> {
        let (session_id, session_revision) = (self.session_id.clone(), self.session_revision);
        let request = ClaimManyRequest { session_id, session_revision, halt_generation: 0, claims };
        let answer = self.client.claim_many(request).await?.into_inner();
        self.session_revision = answer.session_revision;
        Ok(answer)
    }

    /// Reports that an instance has stopped under this token, which gives the claim back.
    ///
    /// # Errors
    /// When the session has ended.
    pub async fn stopped(&self, instance: &str, token: Token) -> anyhow::Result<()> {
        self.report(instance, token, InstanceState::Stopped).await
    }

    /// Reports a state under this token, as the first report of this node; whether it was recorded.
    ///
    /// # Errors
    /// When no answer comes.
    pub async fn recorded(&mut self, instance: &str, token: Token, state: InstanceState) -> anyhow::Result<bool> {
        self.report(instance, token, state).await?;
        timeout(SOON, self.acks.recv()).await?.context("the session has ended")
    }

    /// Whether it was offered something that nobody has looked at yet.
    pub fn is_offered(&mut self) -> bool {
        self.offers.try_recv().is_ok()
    }

    async fn report(&self, instance: &str, token: Token, state: InstanceState) -> anyhow::Result<()> {
        let report = StatusReport {
            instance: instance.to_owned(),
            token: Some(token),
            state: state.into(),
            ..StatusReport::default()
        };
        let message = Some(session_request::Message::Status(report));
        self.requests.send(SessionRequest { message }).await.context("the session has ended")
    }
}
