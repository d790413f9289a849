# Brings an existing workspace up to date: knows the newest base and branch, stands on the branch,
# and keeps whatever was committed or changed. Runs inside the sandbox.
set -eu
git() { command git -c core.hooksPath=/dev/null -c core.fsmonitor=false -c gc.auto=0 "$@"; }

git fetch --quiet --no-tags "$REPOSITORY" '+refs/heads/*:refs/remotes/origin/*'
git rev-parse --quiet --verify "$BASE^{commit}" >/dev/null || git fetch --quiet --no-tags "$REPOSITORY" "$BASE"

here=$(git rev-parse --quiet --verify "refs/heads/$BRANCH^{commit}" || true)
pushed=$(git rev-parse --quiet --verify "refs/remotes/origin/$BRANCH^{commit}" || true)
go=
if [ -z "$here" ]; then
    go=${pushed:-$BASE}
elif [ -n "$pushed" ] && ! git merge-base --is-ancestor "$pushed" "$here"; then
    # The branch went on elsewhere (it was rebased, say); what was here stays under another name.
    git update-ref "refs/artel/before-attempt-$ATTEMPT" "$here"
    go=$pushed
elif [ -z "$pushed" ] && [ "$here" != "$BASE" ] && git merge-base --is-ancestor "$here" "$BASE"; then
    go=$BASE
fi

# A rebase or merge that a killed worker left in the middle.
rm -rf .git/rebase-merge .git/rebase-apply
rm -f .git/MERGE_HEAD .git/CHERRY_PICK_HEAD .git/REVERT_HEAD

# Without an index every file would count as removed.
[ -f .git/index ] || git reset --quiet

on=$(git symbolic-ref --quiet HEAD || true)
if [ -n "$go" ]; then
    set -- checkout --quiet --no-track -B "$BRANCH" "$go"
elif [ "$on" != "refs/heads/$BRANCH" ]; then
    set -- checkout --quiet "$BRANCH"
else
    exit 0
fi
if ! git "$@" 2>/dev/null; then
    # Changes are in the way: they are kept as a stash, which the agent can look into.
    git stash push --quiet --include-untracked --message "before attempt $ATTEMPT"
    git "$@"
fi
