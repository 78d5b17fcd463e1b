//! `drover release`: takes a claim from its holder, by force.

use super::{Context, fetch};
use crate::{arguments::Release, clock, failure::Failure, output, trace::Trace};
use drover_proto::v1::{ReleaseClaimRequest, ReleaseClaimResponse};

/// Releases it.
pub async fn run(context: &Context, options: &Release) -> Result<(), Failure> {
    let (client, trace) = (context.client()?, Trace::begin());
    let request = ReleaseClaimRequest {
        instance: options.instance.clone(),
        token: options.token,
        reason: options.reason.clone().unwrap_or_default(),
    };
    let answer = client
        .write(|mut fleet| {
            let request = trace.request(request.clone());
            async move { fleet.release_claim(request).await }
        })
        .await?;
    context.output.verbose(&format!("trace {}", trace.id()));
    if context.output.is_json() {
        return context.output.document(&fetch::json("ReleaseClaimResponse", &answer)?);
    }
    context.output.line(&sentence(&options.instance, &answer))
}

/// For people.
fn sentence(instance: &str, released: &ReleaseClaimResponse) -> String {
    let node = output::printable(&released.node);
    let token = released.token.map(|token| token.to_string()).unwrap_or_default();
    let state = released.state().as_str_name().trim_start_matches("INSTANCE_STATE_").to_owned();
    let age = match released.held_ms {
        0 => String::new(),
        ms => format!(", held for {}", clock::age(ms / 1000)),
    };
    let until = clock::utc(released.avoided_until.as_ref());
    format!(
        "{} is released: node {node} had it under token {token} ({state}{age}), and gets it again not before {until}",
        output::printable(instance)
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use drover_proto::v1::{InstanceState, Token};

    #[test]
    fn the_sentence_names_holder_token_age_and_what_follows() {
        let released = ReleaseClaimResponse {
            node: "a".to_owned(),
            token: Some(Token { generation: 1, revision: 4711 }),
            state: InstanceState::Loading.into(),
            held_ms: 200_000,
            avoided_until: Some(prost_types::Timestamp { seconds: 60, nanos: 5 }),
        };
        assert_eq!(
            sentence("tiny-x2k9vd", &released),
            "tiny-x2k9vd is released: node a had it under token 1.4711 (LOADING, held for 3m20s), and gets it again not \
             before 1970-01-01T00:01:00Z"
        );
    }
}
