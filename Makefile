# The verbs of the project. Each is one line of what it does; the work is in cargo and in scripts/.
CARGO ?= cargo
.DEFAULT_GOAL := help
.PHONY: help demo test soak check build image images up down migrate bench bench-peers

help: ## show this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

demo: ## build, run the main job from the demo tape, end with a service that answers
	@scripts/demo

test: ## get what the tests need, run all of them, stop what was started
	@scripts/test

soak: ## the long forms of the tests of faults: kills, restarts, cuts, random graphs; some 40 minutes
	@scripts/soak

check: ## format, lints, links of the documentation, dependency audit
	@scripts/check

build: ## build the program for use: target/release/artel, and target/release/spawner
	$(CARGO) build --release --locked -p artel

image: ## build the image of workers in Docker, artel-worker:dev
	@scripts/image

images: ## build the images of the full size, those of PostgreSQL and Redis too where they cannot be had
	@scripts/images

up: ## the full size with Docker Compose: PostgreSQL, Redis, bot, runner, scheduler, spawner
	@scripts/up

down: ## stop the full size; its data stay in Docker's volumes
	@scripts/compose down

migrate: ## bring the database of DATABASE_URL (or of ARTEL_HOME) up to this version
	$(CARGO) run --locked -q -p artel -- migrate

bench: ## measure, and write target/bench/summary.json
	@scripts/bench

bench-peers: ## measure the engine beside LangGraph (installs it under target/), on one PostgreSQL and in memory
	@scripts/bench-peers
