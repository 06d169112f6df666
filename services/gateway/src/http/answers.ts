/**
 * Owns what a relay's answer becomes over HTTP: one object, or a stream of events.
 *
 * Invariants
 * 1. The promise settles when the answer has ended or its client has gone; it rejects with an error that came before
 *    anything was sent, and the error of a stream that had begun is its last event.
 */
import { errorOf, type TokenMessage } from '@lamina/protocol';
import type { LaminaError } from '@lamina/tensor';
import type { FastifyReply } from 'fastify';
import type { AnswerSink } from '../relay.ts';
import { EventStream } from './event-stream.ts';
import { openAiError } from './openai-error.ts';

export interface Answering {
  readonly sink: AnswerSink;
  readonly done: Promise<void>;
}

function failureOf({ error }: TokenMessage): LaminaError | undefined {
  return error === undefined ? undefined : errorOf(error);
}

export interface CollectedAnswer {
  readonly sink: AnswerSink;
  /** Undefined: its client has gone before the end. */
  readonly messages: Promise<TokenMessage[] | undefined>;
}

/** Keeps everything until the end. */
export function collectAnswer(reply: FastifyReply): CollectedAnswer {
  const collected: TokenMessage[] = [];
  const { promise, resolve, reject } = withResolvers<TokenMessage[] | undefined>();
  onGone(reply, () => resolve(undefined));
  const sink: AnswerSink = {
    send: (messages, _, isFinal) => {
      collected.push(...messages);
      if (!isFinal) return;
      const error = failureOf(messages.at(-1)!);
      if (error === undefined) resolve(collected);
      else reject(error);
    },
  };
  return { sink, messages: promise };
}

export interface EventShapes {
  /** Tokens up to this index are not sent again; how the answer ended always is. */
  readonly afterIndex: number;
  readonly event: (message: TokenMessage) => object;
  /** What follows the last token. */
  readonly ending: (last: TokenMessage) => readonly (object | string)[];
}

export function streamAnswer(reply: FastifyReply, { afterIndex, event, ending }: EventShapes): Answering {
  const events = new EventStream(reply);
  const { promise, resolve, reject } = withResolvers<void>();
  onGone(reply, resolve);
  const sink: AnswerSink = {
    send: (messages, _, isFinal) => {
      for (const message of messages) {
        const error = failureOf(message);
        if (error !== undefined && !events.isOpen) return reject(error);
        // An error is no token: who resumes after it wants the token of its index.
        if (error !== undefined) events.send(openAiError(error), undefined);
        else if (message.index > afterIndex) events.send(event(message), message.index);
        else if (message.finish_reason !== null) events.send(event(withoutToken(message)), message.index);
      }
      if (!isFinal) return;
      for (const data of ending(messages.at(-1)!)) events.send(data);
      events.end();
      resolve();
    },
  };
  return { sink, done: promise };
}

/** The end of an answer for whoever has its last token. */
function withoutToken({ id, index, finish_reason, usage }: TokenMessage): TokenMessage {
  return { id, index, token: null, text: '', finish_reason, ...(usage !== undefined && { usage }) };
}

/** Calls back when the connection of a reply has closed, at once if that was before. */
export function onGone({ raw }: FastifyReply, callback: () => void): void {
  if (raw.destroyed) callback();
  else raw.once('close', callback);
}

function withResolvers<T>(): {
  promise: Promise<T>;
  resolve: (value: T) => void;
  reject: (error: LaminaError) => void;
} {
  let resolve: (value: T) => void = () => undefined;
  let reject: (error: LaminaError) => void = () => undefined;
  const promise = new Promise<T>((onValue, onError) => {
    resolve = onValue;
    reject = onError;
  });
  return { promise, resolve, reject };
}
