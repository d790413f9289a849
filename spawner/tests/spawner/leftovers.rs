//! What a hostile worker leaves behind for those who look at it afterwards: trees, files and words.

use crate::hostile::{COMMIT, report};
use crate::stage::{Stage, assert_succeeded, git, kind};
use protocol::EventKind;

#[tokio::test]
async fn a_link_that_leads_out_by_way_of_another_link_is_not_taken_over() {
    let stage = Stage::new([]).await;
    // `a/b/up` is the root, so what is written as going down and up again ends beside the tree, or in its Git folder.
    let links = ["a/b/up/../outside", "a/b/up/.git/config"];
    for (n, target) in (1..).zip(links) {
        let script = format!(
            "mkdir -p a/b; touch a/b/file; ln -sfn ../.. a/b/up; ln -sfn {target} link; git add -A; git commit -qm Links"
        );
        let result = stage.run(&stage.script(&format!("r{n}"), n, &script)).await;
        assert_eq!(kind(&result), spawner::kind::CONTENT_REFUSED, "{target}");
        let evidence = result.failure.unwrap().evidence;
        assert!(evidence.starts_with("link is a link out"), "{evidence}");
        assert_eq!(stage.pushed(), None);
    }
    let script = "ln -sfn a/b/up/README.md link; git add -A; git commit -qm Links";
    assert_succeeded(&stage.run(&stage.script("r9", 9, script)).await);
}

/// Commits a folder with an entry of a name that no `git add` gives.
const NAMED: &str = r#"python3 - "$1" "$2" <<'EOF'
import ast, subprocess, sys
def git(*words, data=b""):
    return subprocess.run(["git", *words], input=data, stdout=subprocess.PIPE, check=True).stdout.strip().decode()
def tree(kind, name, entry):
    content = kind + b" " + name + b"\0" + bytes.fromhex(entry)
    return git("hash-object", "-t", "tree", "-w", "--stdin", "--literally", data=content)
name = ast.literal_eval("b'" + sys.argv[1] + "'")
blob = git("hash-object", "-w", "--stdin", data=b"[core]\n")
top = tree(b"40000", name, tree(b"100644", b"config", blob))
commit = git("commit-tree", "-p", sys.argv[2], "-m", "Named", top)
git("update-ref", "refs/heads/task/one", commit)
EOF
"#;

#[tokio::test]
async fn names_that_some_system_takes_for_the_git_folder_or_a_way_out_are_not_taken_over() {
    let stage = Stage::new([]).await;
    let request = |n: u32, name: &str| {
        let script = format!("{NAMED}{}", report("succeeded"));
        let mut request = stage.script(&format!("r{n}"), n, &script);
        let words = ["sh", name, &stage.base].map(str::to_owned);
        request.agent.command.extend(words);
        request
    };
    let names = [
        ".git",
        ".GIT",
        // Its short name on Windows, and what loses its end there.
        "git~1",
        ".git ",
        ".git.",
        ".git::$INDEX_ALLOCATION",
        // A character that the Mac does not see.
        r".g\xe2\x80\x8cit",
        "..",
        ".",
        "",
        "../outside",
        "a/b",
    ];
    for (n, name) in (1..).zip(names) {
        let result = stage.run(&request(n, name)).await;
        assert_eq!(
            kind(&result),
            spawner::kind::CONTENT_REFUSED,
            "{name}: {result:#?}"
        );
        assert_eq!(stage.pushed(), None);
    }
    // What is no text is a name like any other.
    assert_succeeded(&stage.run(&request(99, r"\xff\xfe")).await);
    assert!(stage.pushed().is_some());
}

#[tokio::test]
async fn what_is_no_file_is_not_read_and_nobody_waits_for_it() {
    let stage = Stage::new([]).await;
    let traps = [
        "rm .git/refs/heads/task/one; mkfifo .git/refs/heads/task/one",
        "rm -r .git/refs/heads/task; rm -f .git/packed-refs; mkfifo .git/packed-refs",
        "mkfifo .git/objects/pack/pack-1.idx",
        "python3 -c 'import socket; socket.socket(socket.AF_UNIX).bind(\".git/objects/info/s\")'",
        "rm -f .git/refs/heads/task/one; mkdir .git/refs/heads/task/one",
        "head -c 100000 /dev/zero > .git/refs/heads/task/one",
        "rm -r .git/refs/heads/task; rm -rf .git/packed-refs; head -c 5000000 /dev/zero > .git/packed-refs",
    ];
    for (n, spring) in (1..).zip(traps) {
        // The agent would wait for the pipe itself.
        let end = report("succeeded").replace("exit 0", "kill -9 $PPID");
        let script = format!("{COMMIT} || true; {spring}; {end}");
        let result = stage.run(&stage.script(&format!("r{n}"), n, &script)).await;
        assert_eq!(
            kind(&result),
            spawner::kind::WORKSPACE_REFUSED,
            "{spring}: {result:#?}"
        );
        assert_eq!(stage.pushed(), None);
    }
}

#[tokio::test]
async fn an_object_that_is_not_what_its_name_says_is_not_taken_over() {
    let stage = Stage::new([]).await;
    // The name promises one thing, and the file has another.
    let swap = "echo honest > f; git add f; git commit -qm Honest
b=$(git rev-parse HEAD:f); e=$(echo evil | git hash-object -w --stdin)
at() { echo .git/objects/$(echo $1 | cut -c1-2)/$(echo $1 | cut -c3-); }
chmod u+w $(at $b); cp $(at $e) $(at $b)";
    let script = format!("{swap}\n{}", report("succeeded"));
    let result = stage.run_script(&script).await;
    assert_eq!(kind(&result), spawner::kind::CONTENT_REFUSED, "{result:#?}");
    assert_eq!(stage.pushed(), None);
}

#[tokio::test]
async fn history_that_is_hidden_from_those_who_count_it_is_counted_all_the_same() {
    let stage = Stage::new([]).await;
    let (author, bare) = (stage.folder.path().join("author"), stage.bare());
    for message in ["Its parent", "The base"] {
        git(&author, &["commit", "-q", "--allow-empty", "-m", message]);
    }
    let base = git(&author, &["rev-parse", "HEAD"]).trim().to_owned();
    // The base is in the repository, but behind no branch of it any more.
    git(&author, &["push", "-q", bare.to_str().unwrap(), "main"]);
    git(&bare, &["update-ref", "refs/heads/main", &stage.base]);
    // Its parent, as the worker has it, has all that the worker adds behind it, so that none of it is new; and of what the
    // repository has, nothing is left that could be compared.
    let hide = r#"tree=$(git rev-parse HEAD^{tree}); c=$(git commit-tree -m 0 $tree); i=1
while [ $i -lt 501 ]; do c=$(git commit-tree -p $c -m $i $tree); i=$((i+1)); done
tip=$(git commit-tree -p HEAD -p $c -m Tip $tree)
mkdir /tmp/packs; find .git/objects/pack -type f -exec mv {} /tmp/packs/ ';'
for pack in /tmp/packs/*.pack; do test ! -e $pack || git unpack-objects -q < $pack; done
python3 - $c $(git rev-parse HEAD^) $(git rev-parse HEAD^^) <<'EOF'
import os, subprocess, sys, zlib
more, parent, first = sys.argv[1:]
content = subprocess.run(["git", "cat-file", "commit", parent], stdout=subprocess.PIPE, check=True).stdout
content = content.replace(first.encode(), more.encode())
place = lambda name: f".git/objects/{name[:2]}/{name[2:]}"
for name in (parent, first):
    os.remove(place(name))
open(place(parent), "wb").write(zlib.compress(b"commit %d\0" % len(content) + content))
EOF
test "$(git rev-list --count $tip ^HEAD)" = 1
git update-ref refs/heads/task/one $tip"#;
    let mut request = stage.script("r1", 1, &format!("{hide}; {}", report("succeeded")));
    request.repository.base_sha = base;
    let result = stage.run(&request).await;
    assert_eq!(kind(&result), spawner::kind::CONTENT_REFUSED, "{result:#?}");
    let failure = result.failure.unwrap();
    // What is hidden does not come along, and is missed; where it comes along, it is counted.
    let missed = failure.evidence.contains("did not receive expected");
    let counted = failure.message.contains("500 commits");
    assert!(missed || counted, "{failure:#?}");
    assert_eq!(stage.pushed(), None);
}

#[tokio::test]
async fn a_workspace_that_cannot_be_tidied_does_not_hold_up_the_next_attempt() {
    let stage = Stage::new([]).await;
    // Deeper than a path can be written, closed, and in the way of what is written there.
    let dig = r#"rm -rf .artel/TASK.md .git/hooks .git/info/attributes .git/config
python3 - <<'EOF'
import os
def dig(top, levels):
    here = os.getcwd()
    os.makedirs(top)
    os.chdir(top)
    for _ in range(levels):
        os.mkdir("deep-deep-deep")
        os.chdir("deep-deep-deep")
    os.chdir(here)
dig(".git/hooks/deep", 1500)
dig(".artel/TASK.md/deep", 1500)
dig("deep", 1500)
EOF
mkfifo .git/info/attributes; mkdir -p .git/config/x; chmod 000 .git/hooks .artel"#;
    let script = format!("{dig}; {}", report("failed"));
    let result = stage.run_script(&script).await;
    // It may be noticed while it is still at it: what cannot be measured counts as too much.
    let kinds = [spawner::kind::AGENT_FAILED, spawner::kind::LIMIT_DISK];
    assert!(kinds.contains(&kind(&result)), "{result:#?}");
    let second = stage.script("r2", 2, &format!("test -f .artel/TASK.md; {COMMIT}"));
    assert_succeeded(&stage.run(&second).await);
    assert_eq!(stage.show("hello.txt"), "hello\n");
    // The tests' own folder is removed with less care.
    let folder = stage.shut_down().await;
    let removed = std::process::Command::new("rm")
        .arg("-rf")
        .arg(folder.path())
        .status();
    assert!(removed.unwrap().success());
}

#[tokio::test]
async fn pipes_where_git_looks_for_files_do_not_hold_up_the_next_attempt() {
    let stage = Stage::new([]).await;
    let first = stage.run_script("exit 1").await;
    assert_eq!(kind(&first), spawner::kind::AGENT_FAILED, "{first:#?}");
    let places = ["HEAD", "index", "refs/heads/main", "MERGE_HEAD"];
    for (n, place) in (2..).zip(places) {
        // As a worker would leave it.
        let pipe = stage.workspace().join(".git").join(place);
        let _ = std::fs::remove_file(&pipe);
        let made = std::process::Command::new("mkfifo").arg(&pipe).status();
        assert!(made.unwrap().success());
        let script = format!("test -f .artel/TASK.md; echo {n} > n; git add n; git commit -qm {n}");
        let result = stage.run(&stage.script(&format!("r{n}"), n, &script)).await;
        assert_succeeded(&result);
        assert_eq!(stage.show("n"), format!("{n}\n"), "{place}");
    }
}

#[tokio::test]
async fn what_a_worker_says_has_nothing_that_a_terminal_obeys() {
    let stage = Stage::new([]).await;
    let script = r#"printf 'log \033]0;title\007\033[2J\033[31mred\033[0m \302\233m\n'
python3 - <<'EOF'
import json, os, urllib.request
evil = "said \x1b]52;c;ZXZpbA==\x07\x1b[2J\u202egnp.exe\x00"
def post(path, **body):
    request = urllib.request.Request(os.environ["ARTEL_BROKER_URL"] + path, json.dumps(body).encode(),
        {"Authorization": "Bearer " + os.environ["ARTEL_BROKER_KEY"]})
    urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request)
post("/v1/progress", text=evil)
post("/v1/result", status="failed", summary=evil * 4000, reason=evil)
EOF
exit 0"#;
    let result = stage.run_script(script).await;
    let failure = result.failure.clone().unwrap();
    assert!(failure.message.contains("said gnp.exe"), "{failure:?}");
    assert!(failure.evidence.contains("log red"), "{failure:?}");
    assert!(result.summary_markdown.starts_with("said gnp.exe"));
    assert!(result.summary_markdown.len() < 70_000, "it is bounded");
    let mut told = vec![failure.message, failure.evidence, result.summary_markdown];
    let mut seen = 0;
    for event in stage.events("r1").await {
        match event.kind {
            EventKind::Progress { text, .. } => {
                assert_eq!(text, "said gnp.exe");
                seen += 1;
            }
            EventKind::Log { tail } => {
                told.push(tail);
                seen += 1;
            }
            _ => {}
        }
    }
    assert!(seen >= 2, "progress and log were told");
    for text in told {
        let obeyed = |c: char| (c.is_control() && c != '\n' && c != '\t') || c == '\u{202e}';
        assert!(!text.contains(obeyed), "{text:?}");
    }
}
