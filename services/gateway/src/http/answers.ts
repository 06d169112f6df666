/**
 * Owns what a relay's answer becomes over HTTP: one object, or a stream of events.
 *
 * Invariants
 * 1. The promise settles when the answer has ended or its client has gone; it rejects with an error that came before
 *    anything was sent, and the error of a stream that had begun is its last event.
 */
import type { TokenMessage } from '@lamina/protocol';
import { LaminaError } from '@lamina/tensor';
import type { FastifyReply } from 'fastify';
import type { AnswerSink } from '../relay.ts';
import { EventStream } from './event-stream.ts';
import { openAiError } from './openai-error.ts';

export interface Answering {
  readonly sink: AnswerSink;
  readonly done: Promise<void>;
}

function errorOf({ error }: TokenMessage): LaminaError | undefined {
  if (error === undefined) return undefined;
  return new LaminaError(error.code, error.message, { retryAfterMs: error.retryAfterMs });
}

/** Keeps everything until the end. */
export function collectAnswer(): { readonly sink: AnswerSink; readonly messages: Promise<TokenMessage[]> } {
  const collected: TokenMessage[] = [];
  const { promise, resolve, reject } = withResolvers<TokenMessage[]>();
  const sink: AnswerSink = {
    send: (messages, _, isFinal) => {
      collected.push(...messages);
      if (!isFinal) return;
      const error = errorOf(messages.at(-1)!);
      if (error === undefined) resolve(collected);
      else reject(error);
    },
  };
  return { sink, messages: promise };
}

export interface EventShapes {
  /** Tokens up to this index are not sent again. */
  readonly afterIndex: number;
  readonly event: (message: TokenMessage) => object;
  /** What follows the last token. */
  readonly ending: (last: TokenMessage) => readonly (object | string)[];
}

export function streamAnswer(reply: FastifyReply, { afterIndex, event, ending }: EventShapes): Answering {
  const events = new EventStream(reply);
  const { promise, resolve, reject } = withResolvers<void>();
  if (reply.raw.destroyed) resolve();
  else reply.raw.once('close', () => resolve());
  const sink: AnswerSink = {
    send: (messages, _, isFinal) => {
      for (const message of messages) {
        const error = errorOf(message);
        if (error !== undefined && !events.isOpen) return reject(error);
        if (message.index > afterIndex || message.finish_reason !== null)
          // An error is no token: who resumes after it wants the token of its index.
          events.send(error === undefined ? event(message) : openAiError(error), error ? undefined : message.index);
      }
      if (!isFinal) return;
      for (const data of ending(messages.at(-1)!)) events.send(data);
      events.end();
      resolve();
    },
  };
  return { sink, done: promise };
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
