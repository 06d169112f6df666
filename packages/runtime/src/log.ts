/**
 * Owns logging: one pino logger per process, JSON lines on stderr.
 */
import { LaminaError } from '@lamina/tensor';
import { destination, type Logger, pino, stdSerializers } from 'pino';

export type { Logger };

function serializeError(error: unknown): unknown {
  if (!(error instanceof LaminaError)) return error instanceof Error ? stdSerializers.err(error) : error;
  const cause = error.cause instanceof Error ? stdSerializers.err(error.cause) : error.cause;
  const stack = error.code === 'internal' ? { stack: error.stack } : {};
  return { code: error.code, message: error.message, ...error.diagnostics, ...stack, cause };
}

export function createLogger(options: { level: string; service: string; instance: string }): Logger {
  return pino(
    {
      level: options.level,
      base: { service: options.service, instance: options.instance },
      serializers: { err: serializeError },
      timestamp: pino.stdTimeFunctions.isoTime,
    },
    destination({ fd: 2, sync: true }),
  );
}
