# Sourced by the launchers.

dry_run=

refuse() { # bad input: one line, exit status 2
  echo "error: $*" >&2
  exit 2
}

usage() { # the comment at the head of the script
  awk 'NR > 1 { if (!/^#/) exit; sub(/^# ?/, ""); print }' "$1"
}

quoted() { # a command, quoted for a shell
  local word line='' quote="'" escaped="'\\''"
  for word in "$@"; do
    case $word in
      *$'\n'*) word=$(printf '%q' "$word") ;;
      '' | *[!a-zA-Z0-9_./:=@%+,-]*)
        word=$quote${word//$quote/$escaped}$quote ;;
    esac
    line="$line $word"
  done
  echo "${line# }"
}

act() { # runs a command, or prints it with --dry_run
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}

whole() { # OPTION VALUE LEAST: refuses all but integers from LEAST
  case $2 in '' | *[!0-9]*) refuse "$1=$2: give a whole number" ;; esac
  [ "$2" -ge "$3" ] || refuse "$1=$2: give $3 or more"
}

named() { # OPTION VALUE: refuses what clouds do not accept as a name
  [ -n "$2" ] || refuse "no $1=NAME given"
  case $2 in
    [!a-z]* | *[!a-z0-9-]* | *-)
      refuse "$1=$2: give a-z, 0-9 and -, beginning with a letter" ;;
  esac
  [ ${#2} -le 40 ] || refuse "$1=$2: give 40 characters or fewer"
}

given() { # OPTION VALUE
  [ -n "$2" ] || refuse "no $1 given; --help shows the options"
}

find_workdir() { # sets workdir from the flags of the training
  local flag
  workdir=
  for flag in "$@"; do
    case $flag in
      --workdir=*) workdir=${flag#*=} ;;
      --coordinator* | --processes* | --process=* | --distributed*)
        refuse "$flag is set by this script; leave it out" ;;
    esac
  done
  case $workdir in
    '') refuse 'no --workdir=DIR after --, the folder of the run' ;;
    *://*) refuse "--workdir=$workdir: give a mounted folder, not an address" ;;
  esac
}
