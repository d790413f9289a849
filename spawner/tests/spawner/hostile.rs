//! A workspace that wants to do harm outside of its sandbox.

use crate::stage::{Stage, assert_succeeded, git, kind};

pub const COMMIT: &str = "echo hello > hello.txt && git add -A && git commit -q -m 'Add hello'";

/// A program for every place where Git would run one; it leaves a sign on the host, which the
/// sandbox itself cannot reach.
///
/// `host` is where the workspace is outside: what it configures has to be found from there.
fn booby_traps(host: &str, canary: &str) -> String {
    format!(
        r#"
trap_=$PWD/.git/trap.sh
printf '#!/bin/sh\nmkdir -p {canary}; touch {canary}/$(basename "$0")-$$; cat\n' > $trap_
chmod +x $trap_
trap_={host}/.git/trap.sh
mkdir -p .git/hooks
for hook in post-checkout pre-commit post-commit reference-transaction post-merge pre-push post-rewrite fsmonitor-watchman pre-auto-gc post-index-change; do
    cp .git/trap.sh .git/hooks/$hook
done
for key in core.fsmonitor core.sshCommand core.gitProxy core.editor core.pager core.askPass \
    uploadpack.packObjectsHook filter.evil.smudge filter.evil.clean filter.evil.process \
    diff.external diff.evil.textconv diff.evil.command merge.evil.driver gpg.program \
    credential.helper trailer.x.command sequence.editor alias.fetch interactive.diffFilter; do
    git config $key $trap_
done
git config core.hooksPath .git/hooks
git config commit.gpgSign true
git config remote.origin.url 'ext::sh -c {canary}'
git config remote.origin.promisor true
git config protocol.ext.allow always
git config extensions.partialClone origin
printf '* filter=evil diff=evil merge=evil\n' > .git/info/attributes
mkdir -p .git/objects/info
"#
    )
}

#[tokio::test]
async fn nothing_that_a_workspace_configures_runs_outside_the_sandbox() {
    let stage = Stage::new([]).await;
    let canary = stage.folder.path().join("canary");
    let host = stage.workspace();
    let traps = booby_traps(host.to_str().unwrap(), canary.to_str().unwrap());
    let report = report("succeeded");
    let script = format!(
        "{COMMIT}; printf '* filter=evil diff=evil merge=evil\\n' > .gitattributes; git add .gitattributes; git commit -qm Attributes; {traps} {report}"
    );
    assert_succeeded(&stage.run_script(&script).await);
    assert_eq!(stage.show("hello.txt"), "hello\n");
    assert!(
        !canary.exists(),
        "{:?}",
        std::fs::read_dir(&canary).map(Iterator::count)
    );
    assert!(springs(&host, &canary), "the traps are good ones");
    std::fs::remove_dir_all(&canary).unwrap();

    // The branch goes on elsewhere, so that the next attempt has to check files out.
    let author = stage.folder.path().join("author");
    let bare = stage.bare();
    git(
        &author,
        &["fetch", "-q", bare.to_str().unwrap(), "task/one:next"],
    );
    git(&author, &["checkout", "-q", "next"]);
    std::fs::write(author.join("hello.txt"), "hello from elsewhere\n").unwrap();
    git(&author, &["commit", "-qam", "Elsewhere"]);
    git(
        &author,
        &["push", "-q", bare.to_str().unwrap(), "next:task/one"],
    );
    let second = stage.script("r2", 2, "git config --get-regexp '^(filter|remote|core.hooks)' && exit 9; cat hello.txt > copy.txt; git add copy.txt; git commit -qm Copy");
    assert_succeeded(&stage.run(&second).await);
    assert_eq!(stage.show("copy.txt"), "hello from elsewhere\n");
    assert!(!canary.exists());
    assert_eq!(
        git(&bare, &["config", "--list", "--local", "--name-only"])
            .lines()
            .filter(|key| !key.starts_with("core."))
            .count(),
        0,
        "nothing was written to the repository's configuration"
    );
}

/// Whether Git, run without care in this workspace, runs into a trap.
fn springs(workspace: &std::path::Path, canary: &std::path::Path) -> bool {
    for args in [["status", "--short"], ["checkout", "-f"]] {
        let run = std::process::Command::new("git")
            .args(["-c", "safe.directory=*", "-C"])
            .arg(workspace)
            .args(args)
            .output();
        assert!(run.is_ok());
    }
    canary.exists()
}

/// Shell that reports to the broker itself and waits to be ended.
pub fn report(status: &str) -> String {
    format!(
        r#"python3 - <<'EOF'
import json, os, urllib.request
body = json.dumps({{"status": "{status}", "summary": "s", "reason": "r"}}).encode()
request = urllib.request.Request(os.environ["ARTEL_BROKER_URL"] + "/v1/result", body,
    {{"Authorization": "Bearer " + os.environ["ARTEL_BROKER_KEY"]}})
urllib.request.build_opener(urllib.request.ProxyHandler({{}})).open(request)
EOF
exit 0"#
    )
}

#[tokio::test]
async fn a_link_out_of_the_tree_is_not_taken_over() {
    let stage = Stage::new([]).await;
    for (n, target) in (1..).zip(["/etc/passwd", "../../../../etc/passwd", ".git/config"]) {
        let script = format!("ln -sfn {target} link; git add link; git commit -qm Link");
        let result = stage.run(&stage.script(&format!("r{n}"), n, &script)).await;
        assert_eq!(kind(&result), spawner::kind::CONTENT_REFUSED, "{target}");
        let evidence = result.failure.unwrap().evidence;
        assert!(
            evidence.contains("link") && evidence.contains(target),
            "{evidence}"
        );
        assert_eq!(stage.pushed(), None);
    }
    let script = "ln -sfn README.md link; git add link; git commit -qm Link";
    assert_succeeded(&stage.run(&stage.script("r9", 9, script)).await);
}

#[tokio::test]
async fn a_submodule_is_not_taken_over_and_nobody_follows_it() {
    let stage = Stage::new([]).await;
    let sprung = stage.folder.path().join("sprung");
    let script = format!(
        "printf '[submodule \"m\"]\n\tpath = m\n\turl = ext::touch {0}\n' > .gitmodules; mkdir m; git add .gitmodules; git update-index --add --cacheinfo 160000,{1},m; git commit -qm Module; git config submodule.m.url 'ext::touch {0}'; git config submodule.m.update '!touch {0}'; git config submodule.recurse true",
        sprung.display(),
        stage.base
    );
    let result = stage.run_script(&script).await;
    assert_eq!(kind(&result), spawner::kind::CONTENT_REFUSED);
    let evidence = result.failure.unwrap().evidence;
    assert!(evidence.contains("m is a submodule"), "{evidence}");
    assert_eq!(stage.pushed(), None);
    let second = format!("git rm -q --cached m; git rm -qf .gitmodules; {COMMIT}");
    assert_succeeded(&stage.run(&stage.script("r2", 2, &second)).await);
    assert!(!sprung.exists());
}

#[tokio::test]
async fn what_the_code_host_runs_is_changed_only_by_a_task_that_may() {
    let stage = Stage::new([]).await;
    let author = stage.folder.path().join("author");
    std::fs::create_dir_all(author.join(".github/workflows")).unwrap();
    std::fs::write(author.join(".github/workflows/ci.yml"), "on: push\n").unwrap();
    git(&author, &["add", "."]);
    git(&author, &["commit", "-q", "-m", "Workflow"]);
    git(
        &author,
        &["push", "-q", stage.bare().to_str().unwrap(), "main"],
    );
    let base = git(&author, &["rev-parse", "HEAD"]).trim().to_owned();
    let request = |n: u32, change: &str| {
        let script =
            format!("git reset -q --hard {base}; {change}; git add -A; git commit -q -m Change");
        let mut request = stage.script(&format!("r{n}"), n, &script);
        request.repository.base_sha.clone_from(&base);
        request
    };
    for (n, change) in (1..).zip([
        "echo 'jobs: {}' >> .github/workflows/ci.yml",
        "echo 'on: push' > .github/workflows/other.yml",
        "git rm -q .github/workflows/ci.yml",
        "git mv .github/workflows .github/elsewhere",
        "git rm -qr .github; ln -s docs .github",
        "git rm -qr .github/workflows; mkdir -p .github docs; touch docs/x; ln -s ../docs .github/workflows",
    ]) {
        let result = stage.run(&request(n, change)).await;
        assert_eq!(kind(&result), spawner::kind::CONTENT_REFUSED, "{change}");
        let evidence = result.failure.unwrap().evidence;
        assert!(evidence.contains("is run by the code host"), "{evidence}");
        assert_eq!(stage.pushed(), None);
    }
    let beside = request(7, "echo 'version: 2' > .github/dependabot.yml");
    assert_succeeded(&stage.run(&beside).await);
    let mut may = request(
        8,
        "git reset -q --hard task/one; echo 'jobs: {}' >> .github/workflows/ci.yml",
    );
    may.agent.command[2] =
        may.agent.command[2].replace(&format!("git reset -q --hard {base}; "), "");
    may.repository.workflows = true;
    assert_succeeded(&stage.run(&may).await);
    assert!(stage.show(".github/workflows/ci.yml").contains("jobs"));
}

#[tokio::test]
async fn only_the_tasks_branch_is_taken_over() {
    let stage = Stage::new([]).await;
    let script = format!(
        "{COMMIT}; git tag v1; git tag -a -m Annotated v2; git branch other; git branch -f main HEAD; git update-ref refs/heads/task/two HEAD; git update-ref refs/artel/x HEAD; git notes add -m Note"
    );
    assert_succeeded(&stage.run_script(&script).await);
    let refs = git(
        &stage.bare(),
        &["for-each-ref", "--format=%(refname) %(objectname)"],
    );
    let pushed = stage.pushed().unwrap();
    let expected = format!(
        "refs/heads/main {}\nrefs/heads/task/one {pushed}\n",
        stage.base
    );
    assert_eq!(refs, expected);
}

#[tokio::test]
async fn history_is_continued_and_never_rewritten() {
    let stage = Stage::new([]).await;
    let orphan = format!("git checkout -q --orphan new; {COMMIT}; git branch -M task/one");
    let result = stage.run_script(&orphan).await;
    assert_eq!(kind(&result), spawner::kind::REWRITTEN_HISTORY);

    // Not by pretending either: replaced parents are a view, not history.
    let pretended = format!("git replace --graft HEAD {}", stage.base);
    let result = stage.run(&stage.script("r2", 2, &pretended)).await;
    assert_eq!(kind(&result), spawner::kind::REWRITTEN_HISTORY);
    assert_eq!(stage.pushed(), None);

    let back = format!(
        "git replace -d $(git replace); git reset -q --hard {}; {COMMIT}",
        stage.base
    );
    assert_succeeded(&stage.run(&stage.script("r3", 3, &back)).await);
    let pushed = stage.pushed();
    let result = stage
        .run(&stage.script("r4", 4, "git commit -q --amend -m Other"))
        .await;
    assert_eq!(
        kind(&result),
        spawner::kind::REWRITTEN_HISTORY,
        "what was pushed stays"
    );
    assert_eq!(stage.pushed(), pushed);
}

#[tokio::test]
async fn a_git_folder_that_leads_elsewhere_is_not_read() {
    let stage = Stage::new([]).await;
    let elsewhere = stage.folder.path().join("elsewhere");
    git(
        stage.folder.path(),
        &["init", "-q", "-b", "main", elsewhere.to_str().unwrap()],
    );
    std::fs::write(elsewhere.join("secret.txt"), "secret").unwrap();
    git(&elsewhere, &["add", "."]);
    git(&elsewhere, &["commit", "-qm", "Secret"]);
    let secret = git(&elsewhere, &["rev-parse", "HEAD"]).trim().to_owned();
    let other = elsewhere.join(".git").display().to_string();
    let traps = [
        // Another repository's objects, by a link and by name.
        format!(
            "mkdir -p .git/objects/info; echo {other}/objects > .git/objects/info/alternates; echo {secret} > .git/refs/heads/task/one"
        ),
        format!("mv .git/objects o; ln -s {other}/objects .git/objects"),
        format!(
            "rm -rf .git/objects/00; ln -s {other}/objects/{} .git/objects/00",
            &secret[..2]
        ),
        // Another branch, by a link and by name.
        format!(
            "rm .git/refs/heads/task/one; ln -s {other}/refs/heads/main .git/refs/heads/task/one"
        ),
        format!("rm -r .git/refs/heads/task; ln -s {other}/refs/heads .git/refs/heads/task"),
        "echo 'ref: refs/heads/main' > .git/refs/heads/task/one".to_owned(),
        // Another Git folder altogether.
        format!("rm -rf .git; echo 'gitdir: {other}' > .git"),
        format!("rm -rf .git; ln -s {other} .git"),
    ];
    for (n, spring) in (1..).zip(traps) {
        let script = format!("{COMMIT} || true; {spring}; {}", report("succeeded"));
        let result = stage.run(&stage.script(&format!("r{n}"), n, &script)).await;
        assert_eq!(kind(&result), spawner::kind::WORKSPACE_REFUSED, "{spring}");
        assert_eq!(stage.pushed(), None);
    }
    // And the next attempt works again, with a Git folder of its own.
    let again = format!("rm -f hello.txt; date +%s%N > new.txt; {COMMIT}");
    assert_succeeded(&stage.run(&stage.script("r99", 99, &again)).await);
    let known = std::process::Command::new("git")
        .arg("-C")
        .arg(stage.bare())
        .args(["cat-file", "-e", &secret])
        .status()
        .unwrap();
    assert!(
        !known.success(),
        "the other repository's commit did not come along"
    );
}

#[tokio::test]
async fn the_task_file_is_written_through_no_link() {
    let stage = Stage::new([]).await;
    let outside = stage.folder.path().join("outside");
    std::fs::create_dir(&outside).unwrap();
    std::fs::write(outside.join("TASK.md"), "mine").unwrap();
    std::fs::write(outside.join("exclude"), "mine").unwrap();
    let spring = format!(
        "rm -rf .artel .git/info; ln -s {0} .artel; ln -s {0} .git/info; {1}",
        outside.display(),
        report("failed")
    );
    assert_eq!(
        kind(&stage.run_script(&spring).await),
        spawner::kind::AGENT_FAILED
    );
    let second = stage.script("r2", 2, &format!("test -f .artel/TASK.md; {COMMIT}"));
    assert_succeeded(&stage.run(&second).await);
    assert_eq!(
        std::fs::read_to_string(outside.join("TASK.md")).unwrap(),
        "mine"
    );
    assert_eq!(
        std::fs::read_to_string(outside.join("exclude")).unwrap(),
        "mine"
    );
}

#[tokio::test]
async fn too_much_is_refused_before_it_is_unpacked() {
    let stage = Stage::new([]).await;
    let script = "i=0; tree=$(git rev-parse HEAD^{tree}); c=$(git rev-parse HEAD); while [ $i -lt 501 ]; do c=$(git commit-tree -p $c -m $i $tree); i=$((i+1)); done; git reset -q --hard $c";
    let result = stage.run_script(script).await;
    assert_eq!(kind(&result), spawner::kind::CONTENT_REFUSED);
    assert!(result.failure.unwrap().message.contains("500 commits"));

    // A bomb: a hundred megabytes of zeros are a hundred kilobytes in Git.
    let bomb = format!(
        "git reset -q --hard {}; head -c 100000000 /dev/zero > zeros; git add zeros; git commit -qm Zeros",
        stage.base
    );
    let result = stage.run(&stage.script("r2", 2, &bomb)).await;
    assert_eq!(kind(&result), spawner::kind::CONTENT_REFUSED);
    assert!(result.failure.unwrap().message.contains("100000000 bytes"));
    assert_eq!(stage.pushed(), None);
}

#[tokio::test]
async fn nothing_of_ours_is_in_the_workers_environment_or_view() {
    let stage = Stage::new([]).await;
    let home = stage.home();
    let script = format!(
        "env | sort > env.txt; ls -A {0} > home.txt 2>&1 || true; cat /proc/*/environ > procs.txt 2>/dev/null || true; id -u > uid.txt; ls -A /run/artel > run.txt; git add -A; git commit -qm Look",
        home.display()
    );
    assert_succeeded(&stage.run_script(&script).await);
    let (env, procs) = (stage.show("env.txt"), stage.show("procs.txt"));
    assert!(
        std::env::var_os("CARGO_MANIFEST_DIR").is_some(),
        "the canary is in our own environment"
    );
    for text in [&env, &procs] {
        assert!(
            !text.contains("CARGO") && !text.contains("NEXTEST"),
            "{text}"
        );
    }
    let names: Vec<&str> = env
        .lines()
        .filter_map(|line| Some(line.split_once('=')?.0))
        .collect();
    for name in [
        "ARTEL_TASK_ID",
        "ARTEL_ATTEMPT",
        "ARTEL_BROKER_URL",
        "ARTEL_BROKER_KEY",
        "OPENAI_BASE_URL",
        "OPENAI_API_KEY",
        "ANTHROPIC_BASE_URL",
        "ANTHROPIC_API_KEY",
        "HTTP_PROXY",
        "HTTPS_PROXY",
    ] {
        assert!(names.contains(&name), "{name} is missing: {names:?}");
    }
    assert!(
        stage.show("home.txt").contains("No such file"),
        "the home is not there"
    );
    assert_eq!(stage.show("uid.txt"), "1000\n");
    let ours = if crate::IN_DOCKER {
        "broker\n"
    } else {
        "agent\nbroker\nlaunch\n"
    };
    assert_eq!(stage.show("run.txt"), ours);
}
