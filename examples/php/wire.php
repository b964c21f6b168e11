<?php

/*
 * What a PHP program needs to talk to stream_ipc, with nothing but PHP 8.1: the library's own messages, and a session
 * that speaks the frame format over two streams, in PHP's own format ("php") or in JSON ("json").
 *
 * It is short, and it waits in its reads. A program that uses the original library has all of this, and more, from it.
 */

declare(strict_types=1);

namespace StreamIpc\Message {

    interface Message
    {
    }

    final class LogMessage implements Message
    {
        public function __construct(public string $message, public string $level = 'info')
        {
        }
    }

    final class ErrorMessage implements Message
    {
        private string $errorMessage;

        public function __construct(string $message, ?\Throwable $error = null)
        {
            if ($error !== null) {
                $message .= "\n" . $error::class . ": {$error->getMessage()}\n{$error->getTraceAsString()}";
            }
            $this->errorMessage = $message;
        }

        public function __toString(): string
        {
            return $this->errorMessage;
        }
    }
}

namespace StreamIpc\Envelope {

    use StreamIpc\Message\Message;

    final class RequestEnvelope implements Message
    {
        public function __construct(public string $id, public Message $request)
        {
        }
    }

    final class ResponseEnvelope implements Message
    {
        public function __construct(public string $id, public Message $response)
        {
        }
    }
}

namespace Wire {

    use StreamIpc\Envelope\RequestEnvelope;
    use StreamIpc\Envelope\ResponseEnvelope;
    use StreamIpc\Message\ErrorMessage;
    use StreamIpc\Message\LogMessage;
    use StreamIpc\Message\Message;

    /** Classes that may come off the wire, besides those that are added to it. */
    const BUILT_IN = [LogMessage::class, ErrorMessage::class, RequestEnvelope::class, ResponseEnvelope::class];

    final class Session
    {
        private const MAGIC = "\xF3\x4A\x9D\xE2";

        /** @var callable(Message): ?Message */
        public $onRequest;

        /** @var callable(Message): void */
        public $onMessage;

        private int $requests = 0;
        private string $received = '';

        /** @var array<string, Message> replies that nobody has taken yet */
        private array $replies = [];

        /**
         * @param resource $write
         * @param resource $read
         * @param string $format "php" or "json"; nothing on the wire says it, so both sides must have been told
         * @param list<class-string> $classes what may come off the wire
         */
        public function __construct(private $write, private $read, private string $format, private array $classes)
        {
            $this->onRequest = fn () => null;
            $this->onMessage = fn () => null;
            array_push($this->classes, ...BUILT_IN);
        }

        public function notify(Message $message): void
        {
            $payload = $this->format === 'json' ? toJson($message) : serialize($message);
            $frame = self::MAGIC . pack('N', strlen($payload)) . $payload;
            while ($frame !== '') {
                $written = @fwrite($this->write, $frame);
                if (!$written) {
                    throw new \RuntimeException('the other side does not read any more');
                }
                $frame = substr($frame, $written);
            }
            fflush($this->write);
        }

        /** Sends a request and waits for its reply; whatever comes before it is seen to meanwhile. */
        public function request(Message $message): Message
        {
            $id = getmypid() . '.' . ++$this->requests;
            $this->notify(new RequestEnvelope($id, $message));
            while (!isset($this->replies[$id])) {
                if (!$this->tick()) {
                    throw new \RuntimeException('the other side ended before it replied');
                }
            }
            $reply = $this->replies[$id];
            unset($this->replies[$id]);
            if ($reply instanceof ErrorMessage) {
                throw new \RuntimeException((string) $reply);
            }
            return $reply;
        }

        /** Waits for one message and sees to it. False: the other side has ended. */
        public function tick(): bool
        {
            $payload = $this->readFrame();
            if ($payload === null) {
                return false;
            }
            try {
                $message = $this->format === 'json' ? fromJson($payload, $this->classes) : $this->unserialize($payload);
            } catch (\Throwable $error) {
                // As in the original, nobody is told: whoever waits for a reply waits until his timeout.
                fwrite(STDERR, "not understood: {$error->getMessage()}\n");
                return true;
            }
            if ($message instanceof ResponseEnvelope) {
                $this->replies[$message->id] = $message->response;
            } elseif ($message instanceof RequestEnvelope) {
                $answer = $this->answer($message->request);
                try {
                    $this->notify(new ResponseEnvelope($message->id, $answer));
                } catch (\JsonException $error) { // bytes that are no UTF-8, INF
                    $answer = new ErrorMessage("The reply cannot be sent: {$error->getMessage()}");
                    $this->notify(new ResponseEnvelope($message->id, $answer));
                }
            } else {
                ($this->onMessage)($message);
            }
            return true;
        }

        private function answer(Message $request): Message
        {
            try {
                return ($this->onRequest)($request) ?? new ErrorMessage('Unhandled request: ' . $request::class);
            } catch (\Throwable $error) {
                return new ErrorMessage('Error in dispatch', $error);
            }
        }

        private function unserialize(string $payload): Message
        {
            $message = @unserialize($payload, ['allowed_classes' => $this->classes]);
            return $message instanceof Message ? $message : throw new \UnexpectedValueException('no message');
        }

        private function readFrame(): ?string
        {
            // Text between frames, such as what the other side prints, is passed on to stderr.
            while (($start = strpos($this->received, self::MAGIC)) === false) {
                $keep = max(0, strlen($this->received) - strlen(self::MAGIC) + 1);
                fwrite(STDERR, substr($this->received, 0, $keep));
                $this->received = substr($this->received, $keep);
                if (!$this->read()) {
                    return null;
                }
            }
            fwrite(STDERR, substr($this->received, 0, $start));
            $this->received = substr($this->received, $start);
            $end = 8;
            do {
                if (strlen($this->received) >= 8) {
                    $end = 8 + unpack('N', $this->received, 4)[1];
                }
                if (strlen($this->received) >= $end) {
                    $payload = substr($this->received, 8, $end - 8);
                    $this->received = substr($this->received, $end);
                    return $payload;
                }
            } while ($this->read());
            return null;
        }

        private function read(): bool
        {
            $chunk = fread($this->read, 65536); // returns what is there, and waits only if that is nothing
            $this->received .= (string) $chunk;
            return $chunk !== false && $chunk !== '';
        }
    }

    function toJson(Message $message): string
    {
        // Slashes and non-ASCII text as they are, and 1.0 as 1.0.
        $flags = JSON_THROW_ON_ERROR | JSON_UNESCAPED_SLASHES | JSON_UNESCAPED_UNICODE | JSON_PRESERVE_ZERO_FRACTION;
        return json_encode(toPlain($message), $flags);
    }

    function toPlain(mixed $value): mixed
    {
        $plain = [];
        if (is_object($value)) {
            $plain['__class'] = $value::class;
            // The keys of private and protected properties have a prefix between two NULs.
            foreach ((array) $value as $key => $property) {
                $plain[preg_replace('/^\0.+\0/', '', (string) $key)] = toPlain($property);
            }
            return $plain;
        }
        return is_array($value) ? array_map(toPlain(...), $value) : $value;
    }

    /** @param list<class-string> $classes */
    function fromJson(string $payload, array $classes): Message
    {
        $message = fromPlain(json_decode($payload, true, 512, JSON_THROW_ON_ERROR), $classes);
        return $message instanceof Message ? $message : throw new \UnexpectedValueException('no message');
    }

    /** @param list<class-string> $classes */
    function fromPlain(mixed $value, array $classes): mixed
    {
        if (!is_array($value)) {
            return $value;
        }
        $class = $value['__class'] ?? null;
        $value = array_map(fn ($item) => fromPlain($item, $classes), $value);
        if (!in_array($class, $classes, true)) {
            return $value;
        }
        $reflection = new \ReflectionClass($class);
        $object = $reflection->newInstanceWithoutConstructor();
        foreach ($reflection->getProperties() as $property) {
            if (array_key_exists($property->getName(), $value)) {
                $property->setValue($object, $value[$property->getName()]);
            }
        }
        return $object;
    }
}
