//! `drover apply`: a deployment from a TOML file.

use super::{Context, fetch};
use crate::{arguments::Apply, failure::Failure, progress::Progress, trace::Trace, wait};
use drover_proto::{
    ids, text,
    v1::{ApplyDeploymentRequest, ApplyDeploymentResponse, DeploymentSpec},
};
use std::{io::Read as _, path::Path};

/// Largest file that is read, in bytes: what a coordinator would accept.
const FILE_BYTES_MAX: u64 = drover_proto::limits::MESSAGE_BYTES_MAX as u64;

/// Applies on the generation that is stored now, or on the one demanded.
pub async fn run(context: &Context, options: &Apply) -> Result<(), Failure> {
    let spec = read(&options.file)?;
    let name = spec.name.clone();
    let client = context.client()?;
    let generation = match options.generation {
        Some(generation) => generation,
        // No deployment can have such a name: apply says what is wrong with it, and with everything else.
        None if ids::check_deployment_name(&name).is_err() => 0,
        None => fetch::deployment(&client, &name).await?.map_or(0, |d| d.generation),
    };
    let trace = Trace::begin();
    let request = ApplyDeploymentRequest { spec: Some(spec), generation };
    let answer: ApplyDeploymentResponse = client
        .write(|mut fleet| {
            let request = trace.request(request.clone());
            async move { fleet.apply_deployment(request).await }
        })
        .await?;
    let mut deployment = answer.deployment.ok_or_else(|| fetch::empty("ApplyDeployment"))?;
    context.output.verbose(&format!("trace {}", trace.id()));
    let what = match (answer.changed, generation) {
        (false, _) => "is unchanged",
        (true, 0) => "is created",
        (true, _) => "is changed",
    };
    if !context.output.is_json() {
        context.output.line(&format!("deployment {name} {what} (generation {})", deployment.generation))?;
    }
    if options.wait.wait {
        let progress = Progress::begin();
        deployment = wait::until_ready(&client, &name, deployment.generation, options.wait.limit(), &progress).await?;
        progress.end();
        if !context.output.is_json() {
            context.output.line(&super::scale::ready_line(&name, deployment.ready_replicas))?;
        }
    }
    if context.output.is_json() {
        let deployment = fetch::json("Deployment", &deployment)?;
        context.output.document(&serde_json::json!({
            "deployment": deployment, "changed": answer.changed, "trace_id": trace.id(),
        }))?;
    }
    Ok(())
}

/// Reads a deployment; "-" is standard input.
fn read(file: &Path) -> Result<DeploymentSpec, Failure> {
    let (name, text) = if file == Path::new("-") {
        ("standard input".to_owned(), limited(std::io::stdin().lock()))
    } else {
        (file.display().to_string(), std::fs::File::open(file).and_then(limited))
    };
    let text = text.map_err(|e| Failure::Input(format!("{name}: {e}")))?;
    parse(&name, &text)
}

fn limited(source: impl std::io::Read) -> std::io::Result<String> {
    let mut text = String::new();
    source.take(FILE_BYTES_MAX + 1).read_to_string(&mut text)?;
    if text.len() as u64 > FILE_BYTES_MAX {
        return Err(std::io::Error::other(format!("is larger than {FILE_BYTES_MAX} bytes: no deployment is")));
    }
    Ok(text)
}

/// Reads the text of a file; errors name the file, the line and the field.
fn parse(file: &str, text: &str) -> Result<DeploymentSpec, Failure> {
    text::from_toml("drover.v1.DeploymentSpec", text).map_err(|e| {
        let message = e.to_string();
        // A syntax error of TOML draws the line with a mark below it.
        let separator = if message.contains('\n') { "\n" } else { " " };
        Failure::Input(format!("{file}:{separator}{}", message.trim_end()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(text: &str) -> String {
        let failure = parse("tiny.toml", text).unwrap_err();
        assert_eq!(failure.exit_code(), 2);
        failure.message().unwrap().to_owned()
    }

    #[test]
    fn a_bad_file_is_refused_with_file_line_and_field() {
        for (text, line, field) in [
            ("name = 'tiny'\nreplcas = 2\n", "line 2", "replcas"),
            ("name = 'tiny'\nreplicas = 'two'\n", "line 2", "replicas"),
            ("name = 'tiny'\nreplicas = 99999999999\n", "line 2", "replicas"),
            ("name = 'tiny'\nmodel_path = 3\n", "line 2", "model_path"),
            ("name = 'tiny'\n\narguments = '--x'\n", "line 3", "arguments"),
            ("name = 'tiny'\nname = 'twice'\n", "line 2", "name"),
            ("name = 'tiny'\nreplicas = \n", "line 2", "replicas"),
        ] {
            let message = refused(text);
            assert!(message.starts_with("tiny.toml:"), "{message}");
            assert!(message.contains(line) && message.contains(field), "{text:?}: {message}");
        }
    }

    #[test]
    fn a_file_that_is_missing_is_named() {
        let failure = read(Path::new("/no/such.toml")).unwrap_err();
        assert!(failure.message().unwrap().starts_with("/no/such.toml: "), "{failure:?}");
        assert_eq!(failure.exit_code(), 2);
    }
}
