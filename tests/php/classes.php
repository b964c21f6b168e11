<?php

/* The classes of the vectors, as the original's tests have them; the older release's names for the library's own. */

declare(strict_types=1);

namespace App\Message {

    use StreamIpc\Message\Message;

    final class TaskRequest implements Message
    {
        public string $job;
    }

    final class TaskResponse implements Message
    {
        public string $result;
    }

    final class Point
    {
        public int $x;
        public int $y;
    }

    /** For random messages: a Point that holds anything. */
    final class Plain
    {
        public mixed $x;
        public mixed $y;
    }

    final class ComplexMessage implements Message
    {
        private string $secret;
        protected int $guarded;
        public Point $point;
        public array $list;
        public array $map;
        public mixed $nothing;
        public bool $flag;
        public int $count;
        public float $ratio;
        public string $text;
    }

    final class AnyMessage implements Message
    {
        public mixed $value;
    }

    final class TypedMessage implements Message
    {
        public int $i;
        public float $f;
        public bool $b;
        public string $s;
        public array $a;
        public ?int $n;
    }

    class BaseMessage implements Message
    {
        private string $hidden;
        protected string $shared;
        public string $title;
    }

    final class ChildMessage extends BaseMessage
    {
        private string $own;
        public int $extra;
    }

    final class LazyMessage implements Message
    {
        public string $set;
        public string $unset;
    }

    final class NotAMessage
    {
        public string $text;
    }

    enum Suit: string
    {
        case Hearts = 'H';
        case Spades = 'S';
    }

    const CLASSES = [
        TaskRequest::class,
        TaskResponse::class,
        Point::class,
        ComplexMessage::class,
        AnyMessage::class,
        TypedMessage::class,
        ChildMessage::class,
        LazyMessage::class,
        NotAMessage::class,
        Suit::class,
    ];
}

namespace {

    // Of random messages; in Python it is test.php.Item, but no class of PHP's has dots in its name.
    final class test_php_Item
    {
        public mixed $name;
        public float $price;
    }
}

namespace PhpStreamIpc\Message {

    final class LogMessage
    {
        public string $message;
        public string $level;
    }

    final class ErrorMessage
    {
        private string $errorMessage;
    }
}

namespace PhpStreamIpc\Envelope {

    final class RequestEnvelope
    {
        public string $id;
        public object $request;
    }

    final class ResponseEnvelope
    {
        public string $id;
        public object $response;
    }
}
