# The images of the full size: `artel` (bot, runner, scheduler) and `spawner`.
#   docker build --target artel -t artel:dev .
#   docker build --target spawner -t artel-spawner:dev .
# Both base images are arguments; what is installed comes from Debian's packages.
ARG BUILD_IMAGE=rust:1.95-bookworm
ARG BASE_IMAGE=debian:bookworm-slim

FROM ${BUILD_IMAGE} AS build
WORKDIR /src
COPY . .
RUN cargo build --release --locked -p artel --bins

# What both need: Git for repositories and workspaces, bubblewrap for code from models, Python for what is built.
FROM ${BASE_IMAGE} AS base
RUN apt-get update \
  && apt-get install -y --no-install-recommends bubblewrap ca-certificates git python3 util-linux \
  && rm -rf /var/lib/apt/lists/*
RUN useradd --system --uid 10001 --home-dir /var/lib/artel --create-home --shell /usr/sbin/nologin artel
ENV ARTEL_HOME=/var/lib/artel ARTEL_LOG=json
WORKDIR /var/lib/artel
USER artel
VOLUME /var/lib/artel

FROM base AS spawner
COPY --from=build /src/target/release/spawner /usr/local/bin/spawner
HEALTHCHECK --interval=10s --timeout=15s --start-period=30s CMD ["spawner", "health"]
ENTRYPOINT ["spawner"]

FROM base AS artel
COPY --from=build /src/target/release/artel /usr/local/bin/artel
HEALTHCHECK --interval=10s --timeout=15s --start-period=30s CMD ["artel", "health"]
ENTRYPOINT ["artel"]
CMD ["up"]
