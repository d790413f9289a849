//! The files that a new repository gets before the first task starts.

use ports::{FileChange, MANIFEST_FILE, Manifest};

use crate::answers::Architecture;

/// What is never committed, whatever the language.
const IGNORED: &str = "\
# What Artel's workers leave behind
.artel/

# What builds, tests and editors leave behind
__pycache__/
*.pyc
.venv/
node_modules/
target/
dist/
.env
.idea/
.vscode/
";

/// What stands under the model's own conventions in every AGENTS.md.
const CONVENTIONS: &str = "\
## How work gets in

- One task, one branch, one pull request. What is not committed does not count.
- `artel.yaml` names the command that checks the repository and the one that starts the service. Both must go on working.
- The service listens on `$HOST:$PORT`, keeps data under `$DATA_DIR`, and reads secrets from its environment. No secret is ever written into the repository.
- There is no network while work is done or checks run.
";

/// The scaffold: README, AGENTS.md, the manifest, the CI workflow and the ignore file.
pub(crate) fn files(architecture: &Architecture) -> Vec<FileChange> {
    let manifest = Manifest {
        version: 1,
        checks: architecture.manifest.checks.clone(),
        service: architecture.manifest.service.clone(),
    };
    let agents = format!("{}\n\n{CONVENTIONS}", architecture.agents_md.trim());
    [
        ("README.md", with_newline(&architecture.readme)),
        ("AGENTS.md", agents.trim_start().to_owned()),
        (MANIFEST_FILE, manifest.to_yaml()),
        (".github/workflows/ci.yml", workflow(&manifest.checks)),
        (".gitignore", IGNORED.to_owned()),
    ]
    .into_iter()
    .map(|(path, content)| FileChange {
        path: path.to_owned(),
        content: Some(content),
    })
    .collect()
}

/// The same checks on a code host.
fn workflow(checks: &str) -> String {
    let script = checks
        .lines()
        .map(|line| format!("          {line}"))
        .collect::<Vec<_>>()
        .join("\n");
    format!(
        "name: CI\n\non:\n  push:\n    branches: [main]\n  pull_request:\n\njobs:\n  checks:\n    runs-on: ubuntu-latest\n    \
         timeout-minutes: 15\n    steps:\n      - uses: actions/checkout@v4\n      - name: Checks\n        run: |\n{script}\n"
    )
}

fn with_newline(text: &str) -> String {
    format!("{}\n", text.trim_end())
}

#[cfg(test)]
mod tests {
    use ports::Service;

    use super::*;
    use crate::answers::ManifestDraft;

    #[test]
    fn the_scaffold_can_be_read_back() {
        let files = files(&Architecture {
            overview: "o".into(),
            manifest: ManifestDraft {
                checks: "set -e\npython3 -m unittest".into(),
                service: Service {
                    command: vec!["python3".into(), "app.py".into()],
                    health: "/health".into(),
                },
            },
            readme: "# Notes".into(),
            agents_md: "Standard library only.".into(),
            tasks: vec![],
        });
        let text = |path: &str| {
            files
                .iter()
                .find(|file| file.path == path)
                .and_then(|file| file.content.clone())
                .expect(path)
        };
        assert_eq!(
            Manifest::parse(&text(MANIFEST_FILE)).unwrap().checks,
            "set -e\npython3 -m unittest"
        );
        assert!(text("AGENTS.md").starts_with("Standard library only.\n\n## How work gets in"));
        assert!(
            text(".github/workflows/ci.yml")
                .contains("run: |\n          set -e\n          python3 -m unittest\n")
        );
        assert_eq!(text("README.md"), "# Notes\n");
    }
}
