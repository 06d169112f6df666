/**
 * Owns putting the gateway together: model and tokenizer, bus, HTTP, and the order in which they start and stop.
 *
 * Invariants
 * 1. Prompts are taken last and given up first: nothing is accepted that could not be relayed.
 */
import { ensureStreams, PromptQueue, TokenStream, WorkQueue } from '@lamina/bus';
import { loadTokenizer, logPull, readModel, resolveModel, type Tokenizer, tokenizerDigest } from '@lamina/model';
import { GATEWAY_QUEUE, SUBJECTS } from '@lamina/protocol';
import {
  collectMetrics,
  hubVariables,
  processEnvironment,
  type RunningService,
  type ServiceContext,
} from '@lamina/runtime';
import type { ServedModel } from './admission.ts';
import { createChat } from './chat.ts';
import { ClusterView } from './cluster-view.ts';
import { DurablePrompts } from './durable-prompts.ts';
import { FewAtATime } from './few-at-a-time.ts';
import { Gateway } from './gateway.ts';
import { createGatewayMetrics, type GatewayMetrics } from './gateway-metrics.ts';
import { Access } from './http/access.ts';
import { ApiKeys } from './http/api-keys.ts';
import { RateLimit } from './http/rate-limit.ts';
import { createHttpServer, listen } from './http.ts';
import type { PreparationParts } from './preparation.ts';
import { createPromptEncoder } from './prompt-encoder.ts';
import { PromptTokenizer } from './prompt-tokenizer.ts';
import { locate } from './request-state.ts';
import { WaitingRoom } from './waiting-room.ts';

/** The kv-manager answers at once or not at all. */
const STATUS_TIMEOUT_MS = 1_000;
const METRICS_WAIT_MS = 250;
const DRAIN_GRACE_MS = 10_000;
/** Answers that are read from the stream at the same time, each with a consumer of its own. */
const MAX_READERS = 32;
/** HTTP connections beyond those of the open requests: for whoever asks, cancels, or keeps one for later. */
const SPARE_CONNECTIONS = 4_096;
const LOOPBACK = new Set(['127.0.0.1', '::1', 'localhost']);
const NO_BYTES = new Uint8Array(0);

function maxTokenBytesOf(tokenizer: Tokenizer): number {
  let bytes = 1;
  for (let token = 0; token < tokenizer.vocabSize; token++) {
    bytes = Math.max(bytes, tokenizer.tokenBytes(token).length);
  }
  return bytes;
}

export async function startGateway({ config, bus, log, registry, complain }: ServiceContext): Promise<RunningService> {
  const modelDir = await resolveModel(config.model, {
    ...hubVariables(processEnvironment()),
    cacheDir: config.cacheDir,
    weights: config.onnxVariant,
    // The graph of an ONNX decoder says what the configuration of a checkpoint does.
    textOnly: config.onnxVariant === undefined,
    ...logPull(log),
  });
  const apiKeys = config.apiKeysFile === undefined ? undefined : await ApiKeys.read(config.apiKeysFile);
  const [description, tokenizer, digest] = await Promise.all([
    readModel(modelDir, config.onnxVariant),
    loadTokenizer(modelDir),
    tokenizerDigest(modelDir),
    ensureStreams(bus),
  ]);
  const { modelId } = description;
  const model: ServedModel = { ...description, maxTokenBytes: maxTokenBytesOf(tokenizer) };
  const { chatTemplate, specialTokens, contextLength } = description;
  const chat = { modelId, chatTemplate, specialTokens };
  const bounds = { contextLength, maxTokenBytes: model.maxTokenBytes };
  const promptTokenizer = new PromptTokenizer(createPromptEncoder(bounds, createChat(chat), tokenizer), {
    worker: { modelDir, digest, bounds, chat },
  });
  const cluster = new ClusterView(bus, modelId, Math.min(STATUS_TIMEOUT_MS, config.requestTimeoutMs));

  const preparation: PreparationParts = { model, promptTokenizer, cluster };
  const tokens = new TokenStream(bus, complain);
  const queue = new WorkQueue(bus);
  const room = new WaitingRoom(() => queue.waiting(), config.maxWaitingWork);
  const unheardSubjectOf = bus.watchUnheard((name) => gateway.handleUnheard(name));
  const gateway = new Gateway(
    {
      ...preparation,
      room,
      queue,
      links: {
        tokens,
        queue,
        readers: new FewAtATime(MAX_READERS),
        locate: (requestId) => locate({ tokens, queue }, requestId),
        publishCancel: (requestId) => {
          if (!bus.isClosed) bus.publish(SUBJECTS.cancel(requestId), NO_BYTES);
        },
      },
      reply: (subject, data, headers, name) => {
        if (!bus.isClosed) bus.publishWithHeaders(subject, data, headers, name && unheardSubjectOf(name));
      },
      maxOpenRequests: config.maxOpenRequests,
      maxOpenPerClient: config.maxOpenPerClient,
      log,
      complain,
    },
    () => metrics,
  );
  const metrics: GatewayMetrics = createGatewayMetrics(registry, {
    open: () => gateway.openRequests,
    waiting: () => room.size,
  });

  const prompts = new DurablePrompts({
    ...preparation,
    prompts: new PromptQueue(bus, (err) => log.warn({ err }, 'durable prompts were not offered')),
    tokens,
    submit: (item, client) => room.through(item, client, (admitted) => queue.submit(admitted)),
    locate: (requestId) => locate({ tokens, queue }, requestId),
    counter: () => metrics.prompts,
    log,
    complain,
  });

  const server = createHttpServer({
    modelId,
    gateway,
    access: new Access(apiKeys, {
      requests: new RateLimit(config.requestsPerMinute, 'requests'),
      followUps: new RateLimit(config.followUpsPerMinute, 'questions about requests and cancellations'),
    }),
    clusterState: () => cluster.live(),
    metrics: () => collectMetrics(bus, METRICS_WAIT_MS),
    bodyLimitBytes: config.httpBodyBytes,
    corsOrigin: config.httpCorsOrigin,
    maxConnections: config.maxOpenRequests + SPARE_CONNECTIONS,
    onError: complain,
  });
  const httpPort = await listen(server, config.httpHost, config.httpPort);

  bus.onStatus((type) => {
    if (type === 'reconnect') gateway.handleReconnect();
  });
  bus.subscribe(SUBJECTS.cancelAll, ({ subject }) => {
    gateway.handleCancel(subject);
    prompts.cancel(subject.slice(subject.lastIndexOf('.') + 1));
  });
  bus.subscribe(SUBJECTS.cancelAll, ({ subject }) => gateway.handleStrayCancel(subject), { queue: GATEWAY_QUEUE });
  bus.service.serveRaw('generate', SUBJECTS.generate, GATEWAY_QUEUE, (message) => gateway.handleGenerate(message));
  // Ready means that the server has the subscriptions.
  await bus.flush();
  void prompts.run();
  if (apiKeys === undefined && !LOOPBACK.has(config.httpHost))
    log.warn({ host: config.httpHost }, 'HTTP is open to whoever reaches it: no LAMINA_API_KEYS_FILE is set');
  log.info({ host: config.httpHost, httpPort, model: modelId }, 'listening');

  return {
    stats: () => ({ openRequests: gateway.openRequests, httpPort }),
    stop: async () => {
      if (!bus.isClosed) await bus.service.withdraw();
      prompts.stop();
      await gateway.drain(bus.isClosed ? 0 : DRAIN_GRACE_MS);
      await promptTokenizer.close();
      await server.close();
    },
  };
}
